"""Checkpoints of other tools, read with nothing executed: what torch.save writes since 1.6, and safetensors.

torch.load is not used. The zip is read here, its pickle by `ldm.bridge.unpickling`, and tensors are made from
their bytes. Damage in a zip is seen by its CRCs, except in what is not read (an optimiser's state).
A safetensors file has no checksum: its layout is verified, but a flipped bit in a weight or in a name cannot
be seen there; compare `sha256` with the publisher's.

A storage is the row of numbers in one file of the zip; a tensor is a view of it: `offset`, and a `stride` for
each dimension of its `size`, all counted in elements.
"""

import hashlib
import math
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.bridge.unpickling import MAX_PICKLE_BYTES, Name, Storage, View, read_pickle
from ldm.errors import CheckpointError
from ldm.layout import listed

DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
MAX_DIMENSIONS = 64  # torch's own limit
MAX_COUNT = 1 << 60  # product of a tensor's sizes, those of 0 left out
CHUNK_BYTES = 1 << 20

# Views may share a storage, or repeat a number by a stride of 0: a small file must not fill the memory.
MAX_EXPANSION = 4
FREE_EXPANSION_BYTES = 64 << 20

# The members that torch.save writes, under one root; anything else belongs to another format.
MEMBER = re.compile(r"(?P<root>[^/\\]+)/(?P<name>data\.pkl|version|byteorder|data/\w+|\.\w+(/\w+)?)")
ENCRYPTED_OR_PATCHED = 0x0001 | 0x0020 | 0x0040 | 0x2000

# What the libraries raise on a damaged file; our own errors get the path and the cure in the same place.
DAMAGE = (
    CheckpointError,
    OSError,
    ValueError,
    EOFError,
    NotImplementedError,
    OverflowError,
    zipfile.BadZipFile,
    struct.error,
    SafetensorError,
)
CURE = (
    "download it again, or save its state dict again with torch.save (torch 1.6 or later) or as safetensors"
)


@dataclass(frozen=True)
class ForeignCheckpoint:
    """Tensors and plain facts of a checkpoint from outside."""

    tensors: dict[str, Tensor]
    """The state dict by its own keys: contiguous tensors of the CPU in their own dtype, sharing no memory."""
    facts: dict[str, int | float | str]
    """Plain values beside the state dict, such as global_step; of a safetensors file, its metadata."""
    sha256: str
    """Of the whole file."""


def read_checkpoint(path: Path) -> ForeignCheckpoint:
    """The tensors and plain facts of a .ckpt, .pt, .pth or .safetensors file, with nothing of it executed.

    The state dict is what stands under `state_dict` (as Lightning writes it), else the saved mapping itself.
    Other objects beside it are ignored; inside it, every value must be a tensor.

    Raises:
        CheckpointError: the file cannot be read, is damaged or hostile, is of another format, or its state
            dict holds something that is no tensor.
    """
    try:
        if not path.is_file():
            raise CheckpointError("there is no such file")
        with path.open("rb") as stream:
            start = stream.read(9)
            stream.seek(0)
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            if path.suffix == ".safetensors":
                tensors, facts = read_safetensors(path)
            elif start.startswith(b"PK\x03\x04"):
                tensors, facts = read_archive(stream, size_bytes=stream.tell())
            else:
                raise CheckpointError(other_format(start))
    except DAMAGE as error:
        raise CheckpointError(
            f"a checkpoint must be an undamaged zip of torch.save or a .safetensors file, and hold tensors; "
            f"{path}: {error}; {CURE}"
        ) from error
    return ForeignCheckpoint(tensors, facts, sha256)


def other_format(start: bytes) -> str:
    """What a file is that is neither a zip nor named .safetensors, by its first bytes."""
    if start.startswith(b"\x80"):
        return "it is a bare pickle, as torch wrote before 1.6"
    if start[8:] == b"{":
        return "it looks like safetensors, but its name does not end in .safetensors"
    return f"it begins with {start[:4]!r}"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, int | float | str]]:
    """Tensors and metadata of a safetensors file, whose header the library of the format verifies."""
    tensors: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if not representable(file.get_slice(key).get_shape()):
                raise CheckpointError(f"{shown(key)} has sizes that torch cannot count")
            view = file.get_tensor(key)
            verify_booleans(key, view)
            tensors[key] = view.clone()  # a view of the file would change with it
        facts = dict(file.metadata() or {})
    verify_keys(tensors)
    return tensors, facts


def read_archive(
    stream: BinaryIO, *, size_bytes: int
) -> tuple[dict[str, Tensor], dict[str, int | float | str]]:
    """Tensors and plain facts of what torch.save wrote."""
    with zipfile.ZipFile(stream) as archive:
        members = verified_members(archive, size_bytes=size_bytes)
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise CheckpointError("its numbers are not little-endian")
        saved = read_pickle(archive.read(members["data.pkl"]))
        views, facts = state_dict_and_facts(saved)
        needed = {key: verified_bytes(key, view, members) for key, view in views.items()}
        limit = MAX_EXPANSION * size_bytes + FREE_EXPANSION_BYTES
        if sum(needed.values()) > limit:
            raise CheckpointError(f"its tensors would take {sum(needed.values())} bytes, over {limit}")
        return read_tensors(archive, members, views), facts


def verified_members(archive: zipfile.ZipFile, *, size_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip by their names under its one root, each stored as torch stores it."""
    members: dict[str, zipfile.ZipInfo] = {}
    roots, num_bytes = set(), 0
    for info in archive.infolist():
        if "/code/" in info.filename or info.filename.endswith("/constants.pkl"):
            raise CheckpointError("it is a TorchScript archive")
        match = MEMBER.fullmatch(info.filename)
        if match is None or match["root"] in (".", "..") or match["name"] in members:
            raise CheckpointError(f"its member {shown(info.filename)} is twice there, or not of torch.save")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ENCRYPTED_OR_PATCHED:
            raise CheckpointError(f"its member {shown(info.filename)} is compressed or encrypted")
        if info.file_size != info.compress_size:
            raise CheckpointError(f"its member {shown(info.filename)} must be as long as it is stored")
        num_bytes += info.file_size
        members[match["name"]] = info
        roots.add(match["root"])
    if len(roots) != 1 or "data.pkl" not in members:
        raise CheckpointError("it must hold one data.pkl under one folder")
    if num_bytes > size_bytes:
        raise CheckpointError(f"its members have {num_bytes} bytes together, the file {size_bytes}")
    if members["data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"its pickle is larger than {MAX_PICKLE_BYTES} bytes")
    return members


def state_dict_and_facts(saved: object) -> tuple[dict[str, View], dict[str, int | float | str]]:
    """The tensors, not yet read, and the plain values beside them."""
    if not isinstance(saved, dict):
        raise CheckpointError(f"it must hold a state dict, and holds {kind_of(saved)}")
    state = saved.get("state_dict", saved)
    if not isinstance(state, dict):
        raise CheckpointError(f"its state_dict must be a mapping, and is {kind_of(state)}")
    verify_keys(state)
    others = [
        f"{shown(key)} ({kind_of(value)})" for key, value in state.items() if not isinstance(value, View)
    ]
    if others:
        raise CheckpointError(f"its state dict must hold tensors alone; {listed(others)}")
    facts = {
        key: value
        for key, value in saved.items()
        if isinstance(key, str) and isinstance(value, int | float | str)
    }
    return state, facts


def verify_keys(state: Mapping[object, object]) -> None:
    """Raise unless there are keys, and all of them are printable text."""
    wrong = [shown(key) for key in state if not (isinstance(key, str) and key.isprintable())]
    if wrong:
        raise CheckpointError(f"keys of its state dict must be printable text; {listed(wrong)}")
    if not state:
        raise CheckpointError("its state dict is empty")


def verified_bytes(key: str, view: View, members: Mapping[str, zipfile.ZipInfo]) -> int:
    """Bytes that a tensor will take, after its storage and its view of it were found possible."""
    storage = view.storage
    if storage.kind not in DTYPES:
        raise CheckpointError(
            f"{shown(key)} is stored as {shown(storage.kind)}; known are {', '.join(DTYPES)}"
        )
    member, width = members.get(f"data/{storage.key}"), DTYPES[storage.kind].itemsize
    if member is None or member.file_size != storage.num_elements * width:
        raise CheckpointError(
            f"{shown(key)} must have {storage.num_elements} elements of {width} bytes stored"
        )
    if len(view.size) != len(view.stride) or len(view.size) > MAX_DIMENSIONS:
        raise CheckpointError(
            f"{shown(key)} must have a stride for each of at most {MAX_DIMENSIONS} dimensions"
        )
    if any(type(number) is not int or number < 0 for number in (view.offset, *view.size, *view.stride)):
        raise CheckpointError(f"offset, size and stride of {shown(key)} must be integers from 0")
    if not inside(view):
        raise CheckpointError(f"{shown(key)} must stay inside its storage of {storage.num_elements} elements")
    return math.prod(view.size) * width


def inside(view: View) -> bool:
    """Whether every element of a view is one of its storage."""
    if 0 in view.size:
        return representable(view.size)
    steps = zip(view.size, view.stride, strict=True)
    return view.offset + sum((size - 1) * stride for size, stride in steps) < view.storage.num_elements


def representable(sizes: Sequence[int]) -> bool:
    """Whether torch can count with these sizes; of an empty tensor too it multiplies the others."""
    return len(sizes) <= MAX_DIMENSIONS and math.prod(size or 1 for size in sizes) < MAX_COUNT


def read_tensors(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], views: Mapping[str, View]
) -> dict[str, Tensor]:
    """The tensors of verified views, each a contiguous copy; a storage is read once, one after the other."""
    sharing: dict[Storage, list[str]] = {}
    for key, view in views.items():
        sharing.setdefault(view.storage, []).append(key)
    tensors = dict.fromkeys(views, torch.empty(0))  # keeps the order of the file
    for storage, keys in sharing.items():
        row = read_storage(archive, members[f"data/{storage.key}"], DTYPES[storage.kind])
        verify_booleans(keys[0], row)
        tensors.update((key, copied(row, views[key])) for key in keys)
    return tensors


def read_storage(archive: zipfile.ZipFile, member: zipfile.ZipInfo, dtype: torch.dtype) -> Tensor:
    """All numbers of a storage, (N,); zipfile verifies the CRC when the last byte is read."""
    row = torch.empty(member.file_size // dtype.itemsize, dtype=dtype)
    room = memoryview(row.view(torch.uint8).numpy())
    filled = 0
    with archive.open(member) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            room[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
    if filled != member.file_size:
        raise CheckpointError(f"its member {shown(member.filename)} ends early")
    return row


def copied(row: Tensor, view: View) -> Tensor:
    """A contiguous copy of a verified view of a row of numbers (N,)."""
    if 0 in view.size:
        return torch.empty(view.size, dtype=row.dtype)
    steps = [step if n > 1 else 0 for n, step in zip(view.size, view.stride, strict=True)]
    return row.as_strided(view.size, steps, view.offset).clone(memory_format=torch.contiguous_format)


def verify_booleans(key: str, tensor: Tensor) -> None:
    """Raise where a boolean is stored as anything but 0 or 1, which torch's operations do not expect."""
    if tensor.dtype is torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
        raise CheckpointError(f"booleans of {shown(key)} must be stored as 0 or 1")


def shown(value: object) -> str:
    """A key or name from the file, short and in ASCII; of anything but text, its kind."""
    return ascii(value[:80]) if isinstance(value, str) else kind_of(value)


def kind_of(value: object) -> str:
    """What a value is, without walking into it."""
    return repr(value) if isinstance(value, Name) else type(value).__name__
