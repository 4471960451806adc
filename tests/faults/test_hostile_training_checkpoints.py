"""Hostile files in the work area of a run: nothing runs, nothing outside changes, the one before is used."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from datasets.keys import canonical_json, sha256_hex
from datasets.store import Store, WorkArea
from ldm.errors import TrainingError
from ldm.training.checkpoint import Checkpoint, Checkpoints, name_of
from ldm.training.record import seal
from ldm.training.state import check_state

GOOD, EVIL = 6, 9
"""Steps of the checkpoint of ours, and of the hostile one, which is newer."""
OF = {"lr": 0.1}
STATE = {"net.weight": torch.arange(6.0).reshape(2, 3), "net.bias": torch.ones(3)}
HISTORY = {"loss": [(24, 0.5)]}


def record(data: bytes, **changes: Any) -> dict[str, Any]:
    """What the JSON of an honest checkpoint with these tensors says, with changes."""
    said = {"step": EVIL, "sha256": sha256_hex(data), "num_bytes": len(data), "of": OF}
    return {**said, "history": HISTORY, "skipped": [], **changes}


def put(work: WorkArea, data: bytes, line: bytes | None = None) -> None:
    """Write the hostile checkpoint; its JSON is sealed and honest about the tensors unless one is given."""
    work.write(f"{name_of(EVIL)}.safetensors", data)
    work.write(f"{name_of(EVIL)}.json", seal(canonical_json(record(data))) if line is None else line)


@pytest.fixture
def work(tmp_path: Path) -> WorkArea:
    """A work area that holds one good checkpoint of ours."""
    area = Store(tmp_path / "store").work("train", "0" * 64)
    with Checkpoints(area, of=OF) as checkpoints:
        checkpoints.save(Checkpoint(GOOD, dict(STATE), dict(HISTORY)))
    return area


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that hostile code would make."""
    return tmp_path / "canary"


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (self.canary, "w")


def assert_the_good_one_is_used(work: WorkArea, canary: Path, *, num_incidents: int = 1) -> None:
    """The hostile one is passed over and reported, does nothing, and a save of its step takes its place."""
    with Checkpoints(work, of=OF) as checkpoints:
        found = checkpoints.load()
        assert found is not None
        assert found.step == GOOD
        assert all(torch.equal(found.tensors[name], value) for name, value in STATE.items())
        assert len(checkpoints.incidents) == num_incidents
        assert all(name_of(EVIL) in incident for incident in checkpoints.incidents)
        assert all(len(incident) < 1000 for incident in checkpoints.incidents)
        checkpoints.save(Checkpoint(EVIL, dict(STATE), dict(HISTORY)))
    after = Checkpoints(work, of=OF).load()
    assert after is not None
    assert after.step == EVIL
    assert not canary.exists()


def archive(saved: bytes) -> bytes:
    """A zip as torch.save writes it, around a pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("archive/data.pkl", saved)
        file.writestr("archive/version", b"3\n")
    return stream.getvalue()


def as_header(data: bytes) -> bytes:
    """A pickle where the header of a safetensors file is, of the right length."""
    return len(data).to_bytes(8, "little") + data


def as_tensors(data: bytes) -> bytes:
    """A pickle behind the tensors of a safetensors file that is right otherwise."""
    return save(STATE) + data


PICKLES: dict[str, Callable[[Path], bytes]] = {
    **{
        f"pickle protocol {protocol}": lambda canary, p=protocol: pickle.dumps(Touch(canary), protocol=p)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "torch archive": lambda canary: archive(pickle.dumps(Touch(canary), protocol=2)),
    "pickle as header": lambda canary: as_header(pickle.dumps(Touch(canary))),
    "pickle behind the tensors": lambda canary: as_tensors(pickle.dumps(Touch(canary))),
}


@pytest.mark.parametrize("make", PICKLES.values(), ids=PICKLES.keys())
def test_a_pickle_is_not_run(make: Callable[[Path], bytes], work: WorkArea, canary: Path) -> None:
    evil = make(canary)
    put(work, evil)
    assert_the_good_one_is_used(work, canary)
    assert canary.name.encode() in evil
    put(work, save(STATE), line=evil)
    assert_the_good_one_is_used(work, canary)


def test_the_pickles_of_these_tests_would_make_the_canary(canary: Path) -> None:
    pickle.loads(pickle.dumps(Touch(canary))).close()
    assert canary.exists()


def header(entries: Any, *, body: bytes = bytes(24), length: int | None = None) -> bytes:
    """A safetensors file with any header at all."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(begin: Any, end: Any, shape: Any = (3,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TENSORS = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "length of 2^64 - 1": b"\xff" * 8 + bytes(100),
    "length of 2^63": header({}, length=2**63),
    "length over the limit of the format": header({}, length=10**8 + 1),
    "length one over the file": header({}, length=27),
    "header that is no JSON": header(b"{" * 24),
    "header that is a list": header([]),
    "header 100,000 lists deep": header(b"[" * 100_000),
    "header 100,000 mappings deep": header(b'{"a":' * 100_000),
    "overlapping tensors": header({"a": entry(0, 12), "b": entry(4, 16)}),
    "two tensors at one place": header({"a": entry(0, 12), "b": entry(0, 12)}),
    "a hole": header({"a": entry(0, 12), "b": entry(16, 28)}, body=bytes(28)),
    "beyond the end": header({"a": entry(0, 12), "b": entry(12, 2**40, (2**38,))}),
    "backwards": header({"a": entry(12, 0)}),
    "before the start": header({"a": entry(-12, 0)}),
    "offsets that are no integers": header({"a": entry(0.5, 12.5)}),
    "shape that overflows": header({"a": entry(0, 24, [2**62, 2**62])}),
    "shape that wraps around to 6": header({"a": entry(0, 24, [2**63 + 3, 2])}),
    "negative shape": header({"a": entry(0, 24, [-2, -3])}),
    "more elements than bytes": header({"a": entry(0, 24, [7])}),
    "type that is unknown": header({"a": entry(0, 24, [6], "PICKLE")}),
    "type that is a path": header({"a": entry(0, 24, [6], "../../F32")}),
}


@pytest.mark.parametrize("data", TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_lie_about_themselves_are_passed_over(data: bytes, work: WorkArea, canary: Path) -> None:
    put(work, data)
    assert_the_good_one_is_used(work, canary)


def changed(**changes: Any) -> bytes:
    """The sealed JSON of honest tensors, with changes."""
    return json.dumps(record(save(STATE), **changes)).encode()


DEEP = b"[" * 100_000 + b"]" * 100_000
RECORDS = {
    "nothing": b"",
    "lists 100,000 deep": DEEP,
    "lists 100,000 deep in its configuration": changed(of={"a": "DEEP"}).replace(b'"DEEP"', DEEP),
    "a million empty lists": b"[" + b"[]," * 1_000_000 + b"[]]",
    "step of 4,000 digits": changed(step=int("9" * 4000)),
    "step of 40,000 digits": changed().replace(b'"step": 9', b'"step": ' + b"9" * 40_000),
    "step that is no number": changed(step=float("nan")),
    "step below zero": changed(step=-9),
    "step with a fraction": changed(step=9.5),
    "step that is true": changed(step=True),
    "step that is text": changed(step="9"),
    "step that is a path": changed(step="../../9"),
    "step that is missing": json.dumps({"sha256": "", "num_bytes": 0}).encode(),
    "size below zero": changed(num_bytes=-1),
    "size of the whole world": changed(num_bytes=2**63),
    "digest that is a path": changed(sha256="/etc/passwd"),
    "history of infinities": changed(history={"loss": [[1, float("inf")]]}),
    "history of no numbers": changed(history={"loss": [[1, float("nan")]]}),
    "history of texts": changed(history={"loss": ["ab"]}),
    "skipped steps that are mappings": changed(skipped=[{}]),
    "unknown field": changed(__reduce__="os.system"),
    "not UTF-8": b'{"step": "\xff\xfe"}',
    "YAML that makes objects": b"!!python/object/apply:os.system ['touch canary']",
}


@pytest.mark.parametrize("content", RECORDS.values(), ids=RECORDS.keys())
def test_a_record_that_is_none_of_ours_is_passed_over(content: bytes, work: WorkArea, canary: Path) -> None:
    for line in (seal(content), content):
        put(work, save(STATE), line=line)
        assert_the_good_one_is_used(work, canary)


def test_a_json_too_large_to_be_ours_is_not_even_read(work: WorkArea, canary: Path) -> None:
    put(work, save(STATE))
    os.truncate(work.path(f"{name_of(EVIL)}.json"), 2**40)
    assert_the_good_one_is_used(work, canary)


def test_tensors_larger_than_their_record_says_are_not_even_read(work: WorkArea, canary: Path) -> None:
    put(work, save(STATE))
    os.truncate(work.path(f"{name_of(EVIL)}.safetensors"), 2**40)
    assert_the_good_one_is_used(work, canary)


def link_to(target: str | Path) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


STRANGE: dict[str, Callable[[Path], None]] = {
    "link to the older one": link_to(f"{name_of(GOOD)}.safetensors"),
    "link to an endless file": link_to("/dev/zero"),
    "link to itself": link_to(f"{name_of(EVIL)}.safetensors"),
    "link to nothing": link_to("nowhere"),
    "link to a folder": link_to("/"),
    "pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE.keys())
@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_what_is_no_file_is_not_opened(
    make: Callable[[Path], None], ending: str, work: WorkArea, canary: Path
) -> None:
    put(work, save(STATE))
    path = work.path(f"{name_of(EVIL)}.{ending}")
    path.unlink()
    make(path)
    # without a JSON that is a file there is no checkpoint to report, as when a save was not finished
    assert_the_good_one_is_used(work, canary, num_incidents=int(ending == "safetensors"))


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_a_link_out_of_the_work_area_is_neither_read_nor_written_through(
    ending: str, work: WorkArea, canary: Path, tmp_path: Path
) -> None:
    put(work, save(STATE))
    outside, path = tmp_path / "outside", work.path(f"{name_of(EVIL)}.{ending}")
    path.rename(outside)
    path.symlink_to(outside)
    before = outside.read_bytes()
    assert_the_good_one_is_used(work, canary, num_incidents=int(ending == "safetensors"))
    assert outside.read_bytes() == before
    assert not path.is_symlink()


NAMES = [
    *("checkpoint-.json", "checkpoint--00000009.json", "checkpoint-0000000009.json", "checkpoint-9.json"),
    *("checkpoint-000000009.json.json", "checkpoint-0000000_9.json", "checkpoint-nan.json"),
    *("checkpoint-9999999999999999999.json", "_checkpoint-000000009.json"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_none_of_ours_is_not_a_checkpoint(name: str, work: WorkArea, canary: Path) -> None:
    for ending in ("json", "safetensors"):
        work.write(name.removesuffix("json") + ending, seal(canonical_json(record(save(STATE)))))
    assert_the_good_one_is_used(work, canary, num_incidents=0)


@pytest.mark.parametrize("name", ["../../net.weight", "/etc/passwd", "net/weight", "net.weight\0"])
def test_a_tensor_whose_name_is_a_path_is_refused_by_name_and_writes_nothing(
    name: str, work: WorkArea, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    put(work, save({**STATE, name: torch.zeros(1)}))
    found = Checkpoints(work, of=OF).load()
    assert found is not None
    with pytest.raises(TrainingError, match="unknown to this run: "):
        check_state(found.tensors, STATE, optimizers={})
    assert {path for path in tmp_path.rglob("*") if name_of(EVIL) not in path.name} == set(before)
