"""What these tests share: checkpoints from outside with a reader that judges, and a real S3 server."""

from __future__ import annotations

import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import fsspec
import pytest
from fsspec.config import conf

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


class S3Server:
    """SeaweedFS on the loopback interface, one process; what it holds survives a kill."""

    BUCKET, KEY, SECRET = "ldm", "ldmaccess", "ldmsecret"
    PORTS = ("master.port", "volume.port", "filer.port", "s3.port", "admin.port")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = dict(zip(self.PORTS, free_ports(len(self.PORTS)), strict=True))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What fsspec needs to find it."""
        return {
            "key": self.KEY,
            "secret": self.SECRET,
            "endpoint_url": f"http://127.0.0.1:{self.ports['s3.port']}",
            "client_kwargs": {"region_name": "us-east-1"},
            "config_kwargs": {"s3": {"addressing_style": "path"}},
        }

    def start(self) -> None:
        """Start it and wait until it answers."""
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        assert weed is not None, "SeaweedFS is missing; `make setup` installs it"
        arguments = [f"-{name}={port}" for name, port in self.ports.items()]
        arguments += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        arguments += ["-webdav=false", "-master.telemetry=false", "-admin.ui=false", f"-dir={self.folder}"]
        self.process = subprocess.Popen(
            [weed, "-logtostderr", "mini", *arguments, f"-bucket={self.BUCKET}"],
            env={**os.environ, "AWS_ACCESS_KEY_ID": self.KEY, "AWS_SECRET_ACCESS_KEY": self.SECRET},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        filesystem = fsspec.filesystem("s3", skip_instance_cache=True, **self.options)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                filesystem.pipe_file(f"{self.BUCKET}/ready", b"ready")
            except Exception:
                time.sleep(0.2)
            else:
                return
        self.kill()
        raise TimeoutError("the S3 server did not answer within a minute")

    def kill(self) -> None:
        """End it without a warning."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, nor on those 10,000 above, where SeaweedFS talks to itself.

    Processes with near numbers begin in ten ports of their own, lest they find the same ones at once.
    """
    found: list[int] = []
    for port in range(20_000 + 10 * (os.getpid() % 1000), 50_000):
        if len(found) == count:
            break
        if all(is_free(place) for place in (port, port + 10_000)):
            found.append(port)
    return found


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def started_server(folder: Path, attempts: int = 3) -> S3Server:
    """A running server; one whose ports a test beside it was faster to take is tried again with others."""
    for attempt in range(attempts):
        server = S3Server(folder / f"seaweed-{attempt}")
        server.folder.mkdir()
        try:
            server.start()
        except TimeoutError:
            continue
        return server
    pytest.fail(f"the S3 server did not answer within a minute, {attempts} times")


@pytest.fixture
def s3_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A running server that stores at ``s3://ldm/...`` find without being told."""
    server = started_server(tmp_path)
    monkeypatch.setitem(conf, "s3", server.options)
    yield server
    server.kill()
