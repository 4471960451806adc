"""Damaged and foreign checkpoint files: refused, or read as they were written; never silently wrong."""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor

if TYPE_CHECKING:
    from tests.faults.conftest import Archive, Refusal

NUM_TRUNCATIONS = 100
NUM_FLIPS = 400
BASE = torch.arange(12.0).reshape(3, 4)
STATE = {"a": BASE, "b": BASE[1:, ::2], "c": torch.tensor([True, False]), "d": torch.tensor(3).half()}
STATE_APART = {key: tensor.clone() for key, tensor in STATE.items()}
GOOD = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}


def torch_file(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def pickle_of(tensor: Tensor) -> bytes:
    with zipfile.ZipFile(io.BytesIO(torch_file({"w": tensor}))) as file:
        return file.read("archive/data.pkl")


def truncations(data: bytes) -> list[bytes]:
    """The beginnings of a file, evenly spread from nothing to all but its last byte."""
    lengths = {round(n * (len(data) - 1) / (NUM_TRUNCATIONS - 1)) for n in range(NUM_TRUNCATIONS)}
    assert len(lengths) == NUM_TRUNCATIONS
    return [data[:length] for length in lengths]


def flipped(data: bytes, position: int) -> bytes:
    damaged = bytearray(data)
    damaged[position // 8] ^= 1 << position % 8
    return bytes(damaged)


def test_every_truncation_is_refused(refusal: Refusal) -> None:
    for data in truncations(torch_file({"state_dict": STATE, "epoch": 5})):
        assert refusal(data, expected=None)
    for data in truncations(save(STATE_APART)):
        assert refusal(data, expected=None, name="a.safetensors")


def test_a_flipped_bit_is_refused_or_changes_nothing(refusal: Refusal) -> None:
    data = torch_file({"state_dict": STATE, "epoch": 5})
    positions = random.Random(0).sample(range(8 * len(data)), NUM_FLIPS)
    refused = [refusal(flipped(data, position), expected=STATE) is not None for position in positions]
    assert NUM_FLIPS // 4 < sum(refused) < NUM_FLIPS


def test_no_bit_of_pickle_or_weights_can_change_unseen(archive: Archive, refusal: Refusal) -> None:
    saved, floats = pickle_of(GOOD["w"]), struct.pack("<4f", 1, 2, 3, 4)
    data = archive(saved)
    assert refusal(data, expected=GOOD) is None
    for part in (saved, floats):
        for byte in range(data.index(part), data.index(part) + len(part)):
            assert "Bad CRC-32" in (refusal(flipped(data, 8 * byte + byte % 8), expected=None) or "")


def patched(data: bytes, old: bytes, new: bytes, *, at_least: int = 1) -> bytes:
    assert data.count(old) >= at_least
    return data.replace(old, new)


def central(data: bytes, name: bytes, offset: int, new: bytes) -> bytes:
    """A zip with a field of a member changed, `offset` bytes into its header in the central directory."""
    at = data.rindex(name) - 46 + offset
    return data[:at] + new + data[at + len(new) :]


def zips(archive: Archive) -> dict[str, tuple[bytes, str]]:
    """Zips that torch.save did not write like this, and what is said about each."""
    state = pickle_of(GOOD["w"])
    plain = archive(state)
    return {
        "deflated": (archive(state, compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
        "deflated bomb": (
            archive(state, members={"data/1": bytes(32 << 20)}, compression=zipfile.ZIP_DEFLATED),
            "compressed or encrypted",
        ),
        "bzip2": (archive(state, compression=zipfile.ZIP_BZIP2), "compressed or encrypted"),
        "lzma": (archive(state, compression=zipfile.ZIP_LZMA), "compressed or encrypted"),
        "encrypted": (central(plain, b"archive/data.pkl", 8, b"\x01"), "compressed or encrypted"),
        "two lengths": (
            central(plain, b"archive/data/0", 24, b"\xff\xff\xff\x7f"),
            "as long as it is stored",
        ),
        "two gigabytes": (
            central(plain, b"archive/data/0", 20, b"\xff\xff\xff\x7f" * 2),
            "bytes together, the file",
        ),
        "renamed inside": (plain.replace(b"archive/data/0", b"archive/data/9", 1), "differ"),
        "names twice": (archive(state, members={"data/1": b""}).replace(b"data/1", b"data/0"), "twice there"),
        "traversal": (archive(state, members={"../../etc/passwd": b""}), r"'archive/\.\./\.\./etc/passwd'"),
        "traversal in data": (archive(state, members={"data/../../x": b""}), "not of torch.save"),
        "absolute": (archive(state, root="/etc"), "not of torch.save"),
        "upward root": (archive(state, root=".."), "not of torch.save"),
        "backslash": (archive(state, members={"data\\0": b""}), "not of torch.save"),
        "two roots": (patched(plain, b"archive/version", b"brchive/version", at_least=2), "under one folder"),
        "no pickle": (patched(plain, b"archive/data.pkl", b"archive/data/pkl", at_least=2), "one data.pkl"),
        "stranger": (archive(state, members={"run.sh": b""}), "not of torch.save"),
        "TorchScript code": (archive(state, members={"code/a.py": b""}), "TorchScript"),
        "TorchScript constants": (archive(state, members={"constants.pkl": b""}), "TorchScript"),
        "big-endian": (archive(state, members={"byteorder": b"big"}), "not little-endian"),
        "false booleans": (
            archive(pickle_of(torch.zeros(4, dtype=torch.bool)), members={"data/0": bytes(range(4))}),
            "must be stored as 0 or 1",
        ),
        "script before the zip": (b"#!/bin/sh\n" + plain, "begins with b'#!/b'"),
        "zip of nothing": (b"PK\x03\x04" + b"PK\x05\x06" + bytes(18), "data.pkl under one folder"),
        "pickle and more": (archive(state + b"N."), "does not end with one value"),
        "empty pickle": (archive(b""), "the pickle is damaged"),
        "text protocol": (archive(b"(dp0\nS'w'\nN."), "opcode DICT"),
    }


def test_zips_of_another_make_are_refused(archive: Archive, refusal: Refusal, tmp_path: Path) -> None:
    for name, (data, message) in zips(archive).items():
        received = refusal(data, expected=None)
        assert received, name
        assert re.search(message, received), (name, received)
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.ckpt"}


def entry(start: int, end: int, *, shape: object = (2,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def assembled(header: object, payload: bytes = bytes(16)) -> bytes:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + payload


SAFETENSORS = {
    "nothing": b"",
    "no header": bytes(8),
    "header of 2 ** 63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "header of all bits": b"\xff" * 8 + b"{}",
    "header of a gigabyte": struct.pack("<Q", 1 << 30) + b"{}",
    "header beyond the file": struct.pack("<Q", 100) + b"{}",
    "header that is a list": assembled([]),
    "header that is no JSON": assembled(b"{"),
    "header that is no UTF-8": assembled(b'{"\xff": 1}'),
    "header of brackets": assembled(b'{"a":' + b"[" * 100_000),
    "no tensors": assembled({}, b""),
    "no tensors but bytes": assembled({}),
    "overlap": assembled({"a": entry(0, 8), "b": entry(4, 12)}),
    "the same bytes twice": assembled({"a": entry(0, 8), "b": entry(0, 8), "c": entry(8, 16)}),
    "hole": assembled({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "bytes to spare": assembled({"a": entry(0, 8)}),
    "bytes missing": assembled({"a": entry(0, 8), "b": entry(8, 16)}, bytes(12)),
    "backwards": assembled({"a": entry(16, 0)}),
    "negative offset": assembled({"a": entry(-8, 0)}),
    "huge offset": assembled({"a": entry(0, (1 << 64) - 1)}),
    "offset beyond 64 bits": assembled({"a": entry(0, 1 << 70)}),
    "other size": assembled({"a": entry(0, 16)}),
    "negative shape": assembled({"a": entry(0, 16, shape=[-4])}),
    "shape that wraps": assembled({"a": entry(0, 16, shape=[1 << 62, 1 << 62])}),
    "shape of a fraction": assembled({"a": entry(0, 16, shape=[4.5])}),
    "shape of text": assembled({"a": entry(0, 16, shape="4")}),
    "unknown type": assembled({"a": entry(0, 16, dtype="F33")}),
    "type of Python": assembled({"a": entry(0, 16, dtype="__class__")}),
    "missing type": assembled({"a": {"shape": [4], "data_offsets": [0, 16]}}),
    "metadata of numbers": assembled({"__metadata__": {"a": 1}, "a": entry(0, 16, shape=[4])}),
    "names twice": assembled(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
    ),
    "unprintable name": assembled({"a\n": entry(0, 16, shape=[4])}),
    "false booleans": assembled({"a": entry(0, 4, shape=[4], dtype="BOOL")}, bytes(range(4))),
    "empty, its other size beyond 63 bits": assembled({"a": entry(0, 0, shape=[0, (1 << 64) - 1])}, b""),
    "pickle by another name": torch_file(STATE),
}


def test_hostile_safetensors_are_refused(refusal: Refusal) -> None:
    for name, data in SAFETENSORS.items():
        assert refusal(data, expected=None, name="a.safetensors"), name
    fine = assembled({"w": entry(0, 16, shape=[4])}, struct.pack("<4f", 1, 2, 3, 4))
    assert refusal(fine, expected=GOOD, name="a.safetensors") is None


def test_flipped_headers_of_safetensors_never_get_past_our_error(refusal: Refusal) -> None:
    data = save(STATE_APART)
    for position in random.Random(0).sample(range(8 * (8 + struct.unpack("<Q", data[:8])[0])), NUM_FLIPS):
        refusal(flipped(data, position), expected=None, name="a.safetensors")


def test_there_are_enough_hostile_files(archive: Archive) -> None:
    assert 2 * NUM_TRUNCATIONS + 2 * NUM_FLIPS + len(zips(archive)) + len(SAFETENSORS) > 1000
