"""The environment is the lock, and the traps found while making it stay closed."""

import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import datasets

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([^\s;]+) \\$")
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")


def locked() -> dict[str, Version]:
    return {match[1]: Version(match[2]) for line in LOCK.splitlines() if (match := PIN.match(line))}


def requirements() -> list[Requirement]:
    project = PROJECT["project"]
    return [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]


def installed(distribution: str) -> Version | None:
    try:
        return Version(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return None


def test_every_line_of_the_lock_is_an_exact_version_or_its_hash() -> None:
    lines = [line for line in LOCK.splitlines() if not line.lstrip().startswith("#")]
    assert len(locked()) > 200
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        assert PIN.match(line) or HASH.match(line), f"neither an exact version nor a hash: {line!r}"
        assert not line.endswith("\\") or HASH.match(after), f"no hash after {line!r}"


def test_the_lock_names_no_index_and_no_machine() -> None:
    # every address and every path has a slash
    for trace in ("/", "index-url", "find-links", "trusted-host", " @ "):
        assert trace not in LOCK


def test_the_lock_fulfils_every_requirement_of_the_project() -> None:
    pins = locked()
    assert len(requirements()) > 20
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in requirements.lock; run `make lock`"
        assert requirement.specifier.contains(pins[name]), (
            f"{requirement} is not met by {pins[name]}; run `make lock`"
        )


def test_what_the_overrides_drop_is_neither_locked_nor_installed() -> None:
    overrides = [Requirement(line) for line in PROJECT["tool"]["uv"]["override-dependencies"]]
    dropped = {requirement.name for requirement in overrides}
    assert dropped == {"dataclasses", "flax", "jax", "jaxlib", "opencv-python"} | {
        "sentence-transformers",
        "transformers",
    }
    for requirement in overrides:
        assert requirement.marker is not None
        assert not requirement.marker.evaluate(), f"the marker of {requirement} must never hold"
        assert requirement.name not in locked()
        assert installed(requirement.name) is None


def test_the_installed_versions_are_the_locked_ones() -> None:
    wrong = {
        name: (installed(name), version) for name, version in locked().items() if installed(name) != version
    }
    assert not wrong, "run `make setup`"


def test_dataclasses_is_the_standard_librarys() -> None:
    assert Path(dataclasses.__file__).is_relative_to(sysconfig.get_path("stdlib"))
    assert not (Path(sysconfig.get_path("purelib")) / "dataclasses.py").exists()


def test_datasets_is_ours_and_hugging_faces_package_is_absent() -> None:
    assert Path(datasets.__file__).resolve() == ROOT / "datasets" / "__init__.py"
    assert installed("datasets") is None


@pytest.mark.parametrize(
    ("name", "lowest", "below"),
    [("fastapi", "0.139", "0.155"), ("webdataset", "0.2.111", "0.3"), ("pyarrow", "25", "26")],
)
def test_known_incompatible_versions_are_out_of_reach(name: str, lowest: str, below: str) -> None:
    assert Version(lowest) <= locked()[name] < Version(below)
    [requirement] = [r for r in requirements() if r.name == name]
    assert not requirement.specifier.contains(below), f"pyproject.toml must exclude {name} {below} and later"


def test_one_package_owns_cv2() -> None:
    owners = importlib.metadata.packages_distributions().get("cv2", [])
    assert set(owners) == {"opencv-python-headless"}


def test_the_prefect_server_can_be_built(tmp_path: Path) -> None:
    program = "from prefect.server.api.server import create_app; create_app(); print('built')"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip().endswith("built")
