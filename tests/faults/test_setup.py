"""The environment is put in place whole or not at all; where none can be made, one sentence says why."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "bash dirname sha256sum readlink uname mkdir flock rm df tail env"
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "house"
version = "1"
[tool.setuptools]
packages = []
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A checkout whose lock is empty, so that its environment takes seconds and no network."""
    house = tmp_path / "a house"
    shutil.copytree(ROOT / "infra", house / "infra")
    (house / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    (house / "requirements.lock").write_text("# nothing\n", encoding="utf-8")
    return house


def environment() -> dict[str, str]:
    # An empty lock brings no setuptools, so the project is built with that of the environment of these tests.
    return {
        **os.environ,
        "PIP_NO_INDEX": "1",
        "PYTHON": sys.executable,
        "PYTHONPATH": sysconfig.get_path("purelib"),
    }


def setup(house: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [house / "infra" / "setup.sh"],
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


def few_tools(folder: Path) -> Path:
    """A folder for PATH with what setup.sh needs before it looks for a python, and no python."""
    folder.mkdir()
    for tool in TOOLS.split():
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    return folder


@pytest.mark.slow
def test_an_environment_is_built_once_and_anew_beside_the_old_one_when_the_lock_changes(house: Path) -> None:
    first = setup(house)
    assert first.returncode == 0, first.stderr
    link = house / ".venv"
    old = link.readlink()
    assert old.parent == Path(".env")
    assert (link / "complete").exists()

    started = time.monotonic()
    again = setup(house)
    assert (again.returncode, again.stdout) == (0, "")
    assert time.monotonic() - started < 1.0

    (house / "requirements.lock").write_text("# nothing, said otherwise\n", encoding="utf-8")
    changed = setup(house)
    assert changed.returncode == 0, changed.stderr
    assert link.readlink() != old
    assert (house / old / "complete").exists()
    assert f"{old} is no longer used" in changed.stdout


@pytest.mark.slow
def test_a_killed_build_leaves_no_link_and_is_built_again(house: Path) -> None:
    guarded = [house / "infra" / "guarded.sh", house / "infra" / "setup.sh"]
    build = subprocess.Popen(guarded, env=environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(house.glob(".env/*/bin/python")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    build.send_signal(signal.SIGKILL)
    build.wait()
    [half] = house.glob(".env/*/")
    assert not (half / "complete").exists()
    assert not (house / ".venv").is_symlink()
    (half / "rubble").touch()

    finished = setup(house)
    assert finished.returncode == 0, finished.stderr
    assert (house / ".venv" / "complete").exists()
    assert not (half / "rubble").exists()


@pytest.mark.slow
def test_a_package_that_cannot_be_installed_is_named_and_leaves_no_link(house: Path) -> None:
    lock = "nowhere==1.0 \\\n    --hash=sha256:" + "0" * 64 + "\n"
    (house / "requirements.lock").write_text(lock, encoding="utf-8")
    failed = setup(house)
    assert failed.returncode == 1
    assert "nowhere==1.0" in failed.stderr
    assert "installing requirements.lock failed" in failed.stderr
    assert not (house / ".venv").is_symlink()


def test_without_a_fitting_python_one_sentence_says_so(house: Path, tmp_path: Path) -> None:
    failed = setup(house, PATH=str(few_tools(tmp_path / "bin")), PYTHON="/nowhere/python")
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1
    assert "CPython 3.11" in failed.stderr
    assert "Linux x86_64" in failed.stderr


def test_too_little_disk_is_said_with_need_and_have(house: Path, tmp_path: Path) -> None:
    tools = few_tools(tmp_path / "bin")
    (tools / "df").unlink()
    (tools / "df").write_text("#!/bin/sh\necho Avail\necho 5000000000\n", encoding="utf-8")
    (tools / "df").chmod(0o755)
    failed = setup(house, PATH=f"{tools}:{os.environ['PATH']}")
    assert failed.returncode == 1
    assert "needs 11000 MB of free disk" in failed.stderr
    assert "has 5000 MB" in failed.stderr
    assert not list(house.glob(".env/*/"))
