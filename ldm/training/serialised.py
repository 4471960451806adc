"""Tensors as the bytes of a safetensors file, copied once: the snapshot of a state is the file to be written.

The library of the format would need the snapshot and the file side by side. It is what reads them back.
"""

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.bool: "BOOL",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""Types of elements -> their names in the format."""

ALIGNMENT_BYTES = 8


def serialised(tensors: Mapping[str, Tensor]) -> bytearray:
    """A safetensors file of tensors of any device and memory layout, as they are now.

    Raises:
        ValueError: a tensor has elements of a type that training keeps none of.
    """
    header, num_bytes = header_of(tensors)
    file = bytearray(len(header) + num_bytes)
    file[: len(header)] = header
    body = torch.frombuffer(file, dtype=torch.uint8)[len(header) :]
    filled = 0
    for name in ordered(tensors):
        tensor = tensors[name].detach()
        room = body[filled : filled + tensor.nbytes]
        room.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        filled += tensor.nbytes
    return file


def header_of(tensors: Mapping[str, Tensor]) -> tuple[bytes, int]:
    """The head of the file, from its length to the padding, and how many bytes of tensors follow it."""
    entries, end = {}, 0
    for name in ordered(tensors):
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = text.ljust(math.ceil(len(text) / ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    return len(padded).to_bytes(8, "little") + padded, end


def ordered(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the order of the file: the widest elements first, so each lies on a multiple of its width."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"a saved tensor must be of one of {', '.join(DTYPES.values())}, but {name} is of "
                f"{tensor.dtype}; convert it where the state is gathered"
            )
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
