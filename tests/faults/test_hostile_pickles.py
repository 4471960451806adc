"""Hostile pickles in checkpoints: nothing they name runs, nothing grows, and no wrong tensor comes out."""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import random
import re
import resource
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from tests.faults.conftest import Archive, Refusal

NUM_SCRAMBLED = 500
GOOD = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}
GROWTH_LIMIT_BYTES = 256 << 20
TIME_LIMIT_S = 10

# Opcodes by hand: the pickler of Python would not write most of these.
PROTO, STOP, MARK, TUPLE, REDUCE, BUILD = b"\x80\x02", b".", b"(", b"t", b"R", b"b"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
ODICT = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = pickle.dumps(value, 2)
    return data[2:-1]


def numbers(*values: int) -> bytes:
    return MARK + b"".join(map(number, values)) + TUPLE


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + MARK + b"".join(arguments) + TUPLE + REDUCE


def storage(*, kind: str = "torch FloatStorage", key: str = "0", count: int = 4) -> bytes:
    name = "c" + kind.replace(" ", "\n") + "\n"
    return MARK + text("storage") + name.encode() + text(key) + text("cpu") + number(count) + TUPLE + b"Q"


def tensor(
    *, of: bytes = storage(), offset: bytes = number(0), size: bytes = numbers(4), stride: bytes = numbers(1)
) -> bytes:
    return TENSOR + MARK + of + offset + size + stride + b"\x89" + ODICT + TUPLE + REDUCE


def state_dict(*extra: bytes, value: bytes | None = None) -> bytes:
    """A pickle of {"w": a tensor}, after which `extra` is done to the dict."""
    return PROTO + b"}" + text("w") + (tensor() if value is None else value) + b"s" + b"".join(extra) + STOP


@dataclass
class Watch:
    """What must not happen while a file is read."""

    canary: Path
    calls: list[str] = field(default_factory=list)


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A canary, a module that touches it when imported, and counters on ways to start a process."""
    watch = Watch(tmp_path / "canary")
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "booby_trap.py").write_text(f"open({str(watch.canary)!r}, 'w').close()\nclass Trap: pass\n")
    monkeypatch.syspath_prepend(modules)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for module in (os, sys.modules["posix"]):
        real = module.system
        monkeypatch.setattr(
            module, "system", lambda line, real=real: (watch.calls.append(line), real(line))[1]
        )
    real_popen = subprocess.Popen

    class Popen(real_popen):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            watch.calls.append("Popen")
            super().__init__(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    return watch


def test_scrambled_pickles_with_right_checksums_never_get_past_our_error(
    archive: Archive, refusal: Refusal, watch: Watch
) -> None:
    rng = random.Random(0)
    saved = state_dict(text("x") + call(b"cos\nsystem\n", text(f"touch {watch.canary}")) + b"s")
    opcodes = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
    for _ in range(NUM_SCRAMBLED):
        scrambled = bytearray(saved)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(scrambled))
            scrambled[at : at + rng.randint(0, 2)] = rng.choice([rng.choice(opcodes), rng.randbytes(1)])
        refusal(archive(bytes(scrambled)), expected=None)
    assert not watch.calls
    assert not watch.canary.exists()


def attacks(canary: str) -> dict[str, bytes]:
    """Pieces of pickle that make the file `canary` when the standard unpickler reads them."""
    line, name, write = text(f"touch {canary}"), text(canary), text("w")
    code = text(f"open({canary!r}, 'w').close()")
    system, getattribute = b"cos\nsystem\n", b"cbuiltins\ngetattr\n"
    os_module = call(b"cbuiltins\n__import__\n", text("os"))
    words = b"]" + MARK + text("touch") + name + b"e"
    nested = call(
        b"c_codecs\nencode\n", text((PROTO + call(system, line) + STOP).decode("latin-1")), text("latin1")
    )
    namespace = call(b"ctypes\nSimpleNamespace\n")
    trap = b"cbooby_trap\nTrap\n"

    def planted(attribute: str) -> bytes:
        return namespace + b"}" + text(attribute) + system + b"s" + BUILD

    return {
        "os.system": call(system, line),
        "posix.system": call(b"cposix\nsystem\n", line),
        "os.system by STACK_GLOBAL": call(text("os") + text("system") + b"\x93", line),
        "os.system from the memo": system + b"q\x070" + call(b"h\x07", line),
        "os.system by INST": MARK + line + b"ios\nsystem\n",
        "os.system by OBJ": MARK + b"cos\nsystem\n" + line + b"o",
        "os.open": call(b"cos\nopen\n", name, number(os.O_CREAT | os.O_WRONLY)),
        "os.mkdir": call(b"cos\nmkdir\n", name),
        "subprocess.getoutput": call(b"csubprocess\ngetoutput\n", line),
        "subprocess.check_call": call(b"csubprocess\ncheck_call\n", words),
        "Popen by NEWOBJ_EX": call(call(getattribute, call(b"csubprocess\nPopen\n", words), text("wait"))),
        "eval": call(b"cbuiltins\neval\n", code),
        "exec": call(b"cbuiltins\nexec\n", code),
        "eval by the name of Python 2": call(b"c__builtin__\neval\n", code),
        "open": call(b"cbuiltins\nopen\n", name, write),
        "io.FileIO by NEWOBJ and __init__": call(b"cio\nFileIO\n", name, write),
        "pathlib": call(call(getattribute, call(b"cpathlib\nPosixPath\n", name), text("touch"))),
        "shutil": call(b"cshutil\ncopyfile\n", text(__file__), name),
        "getattr chain": call(call(getattribute, os_module, text("system")), line),
        "attrgetter": call(call(call(b"coperator\nattrgetter\n", text("system")), os_module), line),
        "methodcaller": call(call(b"coperator\nmethodcaller\n", text("system"), line), os_module),
        "partial": call(call(b"cfunctools\npartial\n", system, line)),
        "partial that BUILD refills": call(
            call(b"cfunctools\npartial\n", b"cbuiltins\nprint\n")
            + MARK
            + system
            + MARK
            + line
            + TUPLE
            + b"}Ntb"
        ),
        "reduce": call(b"cfunctools\nreduce\n", b"cbuiltins\nopen\n", b"]" + write + b"a", name),
        "map": call(b"cbuiltins\ntuple\n", call(b"cbuiltins\nmap\n", system, b"]" + line + b"a")),
        "starmap": call(
            b"cbuiltins\nlist\n", call(b"citertools\nstarmap\n", system, b"]" + MARK + line + TUPLE + b"a")
        ),
        "BUILD that plants __setstate__": planted("__setstate__") + line + BUILD,
        "APPEND to a planted append": planted("append") + line + b"a",
        "ADDITEMS to a planted add": planted("add") + MARK + line + b"\x90",
        "class by GLOBAL": trap,
        "class by STACK_GLOBAL": text("booby_trap") + text("Trap") + b"\x93",
        "class by REDUCE": call(trap),
        "class by NEWOBJ": trap + b")\x81",
        "class by NEWOBJ_EX": trap + b")}\x92",
        "class as a key": b"}" + trap + b"Ns",
        "class in a frozen set": MARK + trap + b"\x91",
        "importlib": call(b"cimportlib\nimport_module\n", text("booby_trap")),
        "runpy": call(b"crunpy\nrun_module\n", text("booby_trap")),
        "pydoc": call(b"cpydoc\nlocate\n", text("booby_trap.Trap")),
        "nested pickle": call(b"cpickle\nloads\n", nested),
        "nested pickle in C": call(b"c_pickle\nloads\n", nested),
        "nested torch.load": call(b"ctorch.storage\n_load_from_bytes\n", nested),
        "timeit": call(b"ctimeit\ntimeit\n", code, text("pass"), b"ctime\nperf_counter\n", number(1)),
        "profiler": call(b"ccProfile\nrun\n", code, name),
        "interpreter": call(
            call(getattribute, call(b"ccode\nInteractiveInterpreter\n"), text("runsource")), code
        ),
        "thread": call(
            call(
                getattribute, call(b"cthreading\nTimer\n", number(0), system, b"]" + line + b"a"), text("run")
            )
        ),
        "type with a hook": call(
            call(b"cbuiltins\ntype\n", text("T"), b")", b"}" + text("__call__") + b"cbuiltins\nexec\n" + b"s")
        )
        + code
        + b"\x85R",
        "rebuilder of torch": call(
            b"ctorch._tensor\n_rebuild_from_type_v2\n", system, b"cbuiltins\nint\n", line + b"\x85", b"}"
        ),
    }


def hiding_places(attack: bytes) -> dict[str, bytes]:
    """Pickles of a state dict that hold an attack, each at another place."""
    return {
        "instead of the file's value": PROTO + attack + STOP,
        "before it": PROTO + attack + b"0" + state_dict()[2:],
        "beside the state dict": PROTO
        + b"}"
        + text("state_dict")
        + state_dict()[2:-1]
        + b"s"
        + attack
        + b"Ns"
        + STOP,
        "instead of a tensor": state_dict(value=attack),
        "as the size of a tensor": state_dict(value=tensor(size=attack)),
        "as the hooks of a tensor": state_dict(value=tensor()[: -2 - len(ODICT)] + attack + TUPLE + REDUCE),
        "as the type of a storage": state_dict(
            value=tensor(of=storage().replace(b"ctorch\nFloatStorage\n", attack))
        ),
        "as a persistent id": state_dict(value=tensor(of=attack + b"Q")),
        "as the state of the dict": state_dict(attack, BUILD),
    }


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_attacks_are_alive_in_the_standard_unpickler(watch: Watch) -> None:
    for name, attack in attacks(str(watch.canary)).items():
        sys.modules.pop("booby_trap", None)
        with contextlib.suppress(Exception):
            pickle.loads(PROTO + attack + STOP)
        assert watch.canary.exists(), name
        if watch.canary.is_dir():
            watch.canary.rmdir()
        else:
            watch.canary.unlink()
    sys.modules.pop("booby_trap", None)
    assert watch.calls


def test_no_attack_runs_from_any_place_in_a_checkpoint(
    archive: Archive, refusal: Refusal, watch: Watch
) -> None:
    count = 0
    for name, attack in attacks(str(watch.canary)).items():
        for place, saved in hiding_places(attack).items():
            refusal(archive(saved), expected=GOOD)
            assert not watch.canary.exists(), f"{name} {place}"
            count += 1
    assert count >= 400
    assert not watch.calls
    assert "booby_trap" not in sys.modules


IMPOSSIBLE = {
    "numel too large": (tensor(of=storage(count=5)), "must have 5 elements of 4 bytes"),
    "numel too small": (tensor(of=storage(count=3)), "must have 3 elements of 4 bytes"),
    "numel negative": (tensor(of=storage(count=-4)), "must have -4 elements"),
    "numel huge": (tensor(of=storage(count=1 << 62)), "must have 4611686018427387904 elements"),
    "wider type": (tensor(of=storage(kind="torch DoubleStorage")), "4 elements of 8 bytes"),
    "unknown type": (tensor(of=storage(kind="torch QInt8Storage")), r"stored as 'torch\.QInt8Storage'"),
    "missing storage": (tensor(of=storage(key="1")), "must have 4 elements"),
    "storage outside": (tensor(of=storage(key="../data.pkl")), "must have 4 elements"),
    "offset beyond": (tensor(offset=number(1)), "must stay inside its storage of 4 elements"),
    "offset negative": (tensor(offset=number(-1), size=numbers(1)), "must be integers from 0"),
    "offset huge": (tensor(offset=number((1 << 63) - 1)), "must stay inside"),
    "offset as text": (tensor(offset=text("0")), "no tensor|tensors alone"),
    "stride beyond": (tensor(stride=numbers(2)), "must stay inside"),
    "stride negative": (tensor(offset=number(3), stride=numbers(-1)), "must be integers from 0"),
    "stride missing": (tensor(stride=b")"), "must have a stride for each"),
    "size beyond": (tensor(size=numbers(5)), "must stay inside"),
    "size negative": (tensor(size=numbers(-1)), "must be integers from 0"),
    "size that wraps": (tensor(size=numbers(1 << 32, 1 << 32), stride=numbers(1, 1)), "must stay inside"),
    "size of nothing huge": (tensor(size=numbers(0, 1 << 60), stride=numbers(1, 1)), "must stay inside"),
    "size of floats": (tensor(size=MARK + b"G" + struct.pack(">d", 4) + TUPLE), "must be integers from 0"),
    "size of booleans": (tensor(size=MARK + b"\x88" + TUPLE), "must be integers from 0"),
    "size beyond 64 bits": (tensor(size=numbers(1 << 70)), "must be integers from 0"),
    "dimensions": (tensor(size=numbers(*[1] * 65), stride=numbers(*[1] * 65)), "at most 64 dimensions"),
    "expansion": (
        tensor(size=numbers(1 << 30, 1 << 10), stride=numbers(0, 0)),
        "would take 4398046511104 bytes",
    ),
    "arguments": (TENSOR + MARK + storage() + TUPLE + REDUCE, "tensors alone"),
    "device rebuilder": (
        tensor().replace(b"_rebuild_tensor_v2", b"_rebuild_device_tensor_from_numpy"),
        "_from_numpy",
    ),
    "storage itself": (storage(), r"'w' \(Storage\)"),
    "id of text": (tensor(of=text("0") + b"Q"), "persistent id"),
    "id of another kind": (tensor(of=storage().replace(text("storage"), text("module"))), "persistent id"),
    "id too short": (tensor(of=text("storage") + b"\x85Q"), "persistent id"),
    "id whose key is a number": (tensor(of=storage().replace(text("0"), number(0))), "persistent id"),
    "id in text form": (tensor(of=b"P0\n"), "opcode PERSID"),
    "state for a tensor": (tensor() + b"}b", "gives state to what is no object"),
    "call of a tensor": (tensor() + b")R", "calls what is neither"),
    "append to a tensor": (tensor() + b"Na", "appends to what is no list"),
    "item of a tensor": (tensor() + b"NNs", "sets an item of what is no dict"),
    "extension registry": (b"\x82\x01", "opcode EXT1"),
    "extension registry, wider": (b"\x84\x01\x00\x00\x00", "opcode EXT4"),
    "out-of-band buffer": (b"\x97", "opcode NEXT_BUFFER"),
    "empty stack": (b"s" * 9, "SETITEM at byte 9"),
    "no such memo": (b"h\x09", "BINGET at byte 9"),
    "no mark": (TUPLE, "needs what is not there"),
    "open mark": (MARK, "SETITEM"),
    "integer without end": (b"\x8b\xff\xff\xff\x7f", "the pickle is damaged"),
    "integer of negative length": (b"\x8b\xff\xff\xff\xff", "the pickle is damaged"),
    "text without end": (b"\x8d" + struct.pack("<Q", 1 << 62), "the pickle is damaged"),
    "bytes beyond all memory": (b"\x8e" + b"\xff" * 8, "the pickle is damaged"),
    "text that is no UTF-8": (b"X\x01\x00\x00\x00\xff", "the pickle is damaged"),
    "name of text and number": (text("os") + number(1) + b"\x93", "names a class by what is no text"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_tensors_and_opcodes_are_refused(archive: Archive, refusal: Refusal, case: str) -> None:
    value, message = IMPOSSIBLE[case]
    assert re.search(message, refusal(archive(state_dict(value=value)), expected=GOOD) or "")


DEEP = b")" + b"\x85" * 200_000
WIDE = b")" + b"q\x01h\x01\x86" * 300
NAME = text("n" * 2_000_000) + b"q\x01"
ARGUMENTS = MARK + b"N" * 100_000 + TUPLE + b"q\x01"
BOMBS = {
    "deep tuple": state_dict(value=DEEP),
    "deep tuple as a key": state_dict(DEEP, b"Ns"),
    "deep list": state_dict(value=b"]" * 100_000 + b"a" * 99_999),
    "deep dict": state_dict(value=b"}N" * 100_000 + b"Ns" + b"s" * 99_999),
    "tuple of 2 ** 300": state_dict(value=WIDE),
    "tuple of 2 ** 300 as a key": state_dict(WIDE, b"Ns"),
    "tuple of 2 ** 300 called with": state_dict(value=b"ccollections\nOrderedDict\n" + WIDE + b"R"),
    "list in itself": state_dict(value=b"]q\x01h\x01a"),
    "memo of four billion": state_dict(value=b"Nr\xff\xff\xff\xff"),
    "integer of eight million bits as a key": state_dict(
        number(1 << 8_000_000), b"q\x01Ns", b"h\x01Ns" * 100_000
    ),
    "names of four million letters": state_dict(value=NAME + b"(" + b"h\x01h\x01\x93" * 100_000 + b"t"),
    "arguments copied again and again": state_dict(value=ARGUMENTS + TENSOR + b"q\x02" + b"h\x02h\x01R0" * 9),
    "arguments given again and again": state_dict(
        value=TENSOR + b"q\x02" + ARGUMENTS + b"(" + b"h\x02h\x01R" * 100_000 + b"t"
    ),
    "equal long keys": state_dict(
        *[text("k" * 4_000_000) + b"q\x01" + b"Ns", text("k" * 4_000_000) + b"q\x02Ns", b"h\x02Ns" * 100_000]
    ),
    "opcodes": state_dict(value=b"(" + b"}" * 1_000_000 + b"t"),
    "pickle of 65 MiB": state_dict(value=b"B" + struct.pack("<I", 65 << 20) + bytes(65 << 20)),
    "views of one storage": state_dict(
        tensor(of=storage() + b"q\x01", size=numbers(1 << 20), stride=numbers(0)) + b"q\x020",
        *[text(f"w{n}") + b"h\x02s" for n in range(40)],
    ),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_cost_little_time_and_memory(archive: Archive, refusal: Refusal, case: str) -> None:
    data = archive(BOMBS[case])
    peak_before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    refusal(data, expected=GOOD)
    assert time.process_time() - start < TIME_LIMIT_S
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before) < GROWTH_LIMIT_BYTES


def test_pickles_assembled_here_are_read_when_nothing_is_wrong_with_them(
    archive: Archive, refusal: Refusal
) -> None:
    assert refusal(archive(state_dict()), expected=GOOD) is None
