"""The guard leaves no process of a run alive, whoever is killed and however the process daemonised."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
GUARDED = str(ROOT / "infra" / "guarded.sh")
GONE_WITHIN_S = 5.0

# A family: the command itself, a child, a child in a session of its own, and one reparented to init.
FAMILY = """
import os, subprocess, sys, time
mark = sys.argv[1]
sleeper = [sys.executable, "-c", "import time; time.sleep(300)", mark]
subprocess.Popen(sleeper)
subprocess.Popen(sleeper, start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, sleeper)
    os._exit(0)
os.wait()
if sys.argv[2] == "stay":
    time.sleep(300)
sys.exit(7)
"""


def wait_until(condition: Callable[[], bool], *, timeout_s: float = GONE_WITHIN_S) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def processes_with(mark: str) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "status"])
        if process.info["status"] != psutil.STATUS_ZOMBIE and mark in (process.info["cmdline"] or [])
    ]


def watchers_of(pid: int) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "--watch" in (line := process.info["cmdline"] or []) and any(p.startswith(f"{pid}:") for p in line)
    ]


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    """An argument that names the processes of one test; whatever still carries it at the end is killed."""
    yield str(tmp_path)
    for pid in processes_with(str(tmp_path)):
        os.kill(pid, signal.SIGKILL)


def family(mark: str, *, then: str = "stay") -> list[str]:
    return [GUARDED, sys.executable, "-c", FAMILY, mark, then]


def all_there(mark: str, *, size: int = 4) -> Callable[[], bool]:
    return lambda: len(processes_with(mark)) >= size


def none_left(mark: str) -> Callable[[], bool]:
    return lambda: not processes_with(mark)


def test_exit_status_is_the_commands_own_and_leftovers_die_after_a_normal_end(mark: str) -> None:
    finished = subprocess.run(family(mark, then="end"), check=False, timeout=30)
    assert finished.returncode == 7
    assert wait_until(none_left(mark))


def test_killing_the_command_kills_every_descendant(mark: str) -> None:
    command = subprocess.Popen(family(mark))
    assert wait_until(all_there(mark), timeout_s=20)
    command.kill()
    command.wait()
    assert wait_until(none_left(mark))


def test_killing_the_caller_kills_the_command_and_every_descendant(mark: str) -> None:
    caller = subprocess.Popen(["bash", "-c", f"{shlex.join(family(mark))}; :"])
    assert wait_until(all_there(mark), timeout_s=20)
    caller.kill()
    caller.wait()
    assert wait_until(none_left(mark))


def test_killing_the_whole_process_group_spares_nothing(mark: str) -> None:
    caller = subprocess.Popen(["bash", "-c", f"{shlex.join(family(mark))}; :"], start_new_session=True)
    assert wait_until(all_there(mark), timeout_s=20)
    os.killpg(caller.pid, signal.SIGKILL)
    caller.wait()
    assert wait_until(none_left(mark))


def test_killing_make_kills_the_command_though_a_shell_stands_between(mark: str, tmp_path: Path) -> None:
    script = tmp_path / "family.sh"
    script.write_text(f"#!/usr/bin/env bash\n{shlex.join(family(mark))}\n")  # the guard's parent is a shell
    script.chmod(0o755)
    (tmp_path / "Makefile").write_text(f"all:\n\t@GUARD_CALLER=$$PPID {script}; true\n")
    make = subprocess.Popen(["make", "-C", str(tmp_path)], stdout=subprocess.DEVNULL)
    assert wait_until(all_there(mark), timeout_s=20)
    make.kill()
    make.wait()
    assert wait_until(none_left(mark))


def test_a_guard_within_a_guard_dies_with_the_outer_caller(mark: str) -> None:
    inner = shlex.join(family(mark))
    caller = subprocess.Popen(["bash", "-c", f"{GUARDED} bash -c {shlex.quote(inner + '; :')}; :"])
    assert wait_until(all_there(mark), timeout_s=20)
    caller.kill()
    caller.wait()
    assert wait_until(none_left(mark))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_command(mark: str, number: signal.Signals) -> None:
    program = (
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(5))\n"
        "print('ready', flush=True)\n"
        "time.sleep(300)\n"
    )
    command = subprocess.Popen(
        [GUARDED, sys.executable, "-c", program, mark], stdout=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    with command.stdout:
        assert command.stdout.readline() == "ready\n"
        command.send_signal(number)
        assert command.wait(timeout=10) == 5


def test_a_stranger_is_spared_and_the_watcher_ends_with_its_work(mark: str) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", mark])
    command = subprocess.Popen([GUARDED, "sleep", "300"])
    assert wait_until(lambda: bool(watchers_of(command.pid)))
    command.kill()
    command.wait()
    assert wait_until(lambda: not watchers_of(command.pid))
    assert processes_with(mark) == [stranger.pid]
    stranger.kill()
    stranger.wait()


def test_without_a_command_it_says_how_it_is_used() -> None:
    finished = subprocess.run([GUARDED], check=False, capture_output=True, text=True)
    assert finished.returncode == 2
    assert "usage: infra/guarded.sh COMMAND" in finished.stderr
