"""What tests of checkpoints from outside share: a zip as torch.save lays it out, and a reader that judges."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from torch import Tensor


class Archive(Protocol):
    """Makes the zip of a pickle and of storage 0, four floats; `members` are added, or replace its own."""

    def __call__(
        self,
        saved: bytes,
        *,
        root: str = ...,
        members: dict[str, bytes] | None = ...,
        compression: int = ...,
    ) -> bytes: ...


class Refusal(Protocol):
    """Reads a file: the message of our error, or None where the tensors are the expected ones."""

    def __call__(self, data: bytes, *, expected: dict[str, Tensor] | None, name: str = ...) -> str | None: ...


@pytest.fixture(scope="session")
def archive() -> Archive:
    def make(
        saved: bytes,
        *,
        root: str = "archive",
        members: dict[str, bytes] | None = None,
        compression: int = zipfile.ZIP_STORED,
    ) -> bytes:
        floats = struct.pack("<4f", 1, 2, 3, 4)
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", compression) as file:
            own = {"data.pkl": saved, "version": b"3\n", "byteorder": b"little", "data/0": floats}
            for name, data in {**own, **(members or {})}.items():
                file.writestr(f"{root}/{name}", data)
        return stream.getvalue()

    return make


@pytest.fixture
def refusal(tmp_path: Path) -> Refusal:
    import torch

    from ldm.bridge.foreign import read_checkpoint
    from ldm.errors import CheckpointError

    def read(data: bytes, *, expected: dict[str, Tensor] | None, name: str = "a.ckpt") -> str | None:
        path = tmp_path / name
        path.write_bytes(data)
        try:
            tensors = read_checkpoint(path).tensors
        except CheckpointError as error:
            message = str(error)
        else:
            if expected is not None:
                assert tensors.keys() == expected.keys()
                for key, tensor in expected.items():
                    assert tensors[key].dtype == tensor.dtype
                    assert torch.equal(tensors[key], tensor)
            return None
        assert str(path) in message
        assert len(message) < 2000
        return message

    return read
