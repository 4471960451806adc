"""The house keeps its shape: few folders, module-path entrypoints, decisions that are written down."""

import fnmatch
import importlib
import inspect
import re
import subprocess
from pathlib import Path
from typing import Any

import prefect
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {".ci", "datasets", "flows", "infra", "ldm", "tests"}
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))[
    "deployments"
]
DECISIONS = sorted((ROOT / "infra" / "decisions").glob("*.md"))


def flow_of(deployment: dict[str, Any]) -> prefect.Flow[Any, Any]:
    module, _, name = deployment["entrypoint"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_root_holds_only_the_known_folders() -> None:
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
    found = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir()
        and path.name != ".git"
        and not any(fnmatch.fnmatch(path.name, line) for line in ignored)
    }
    assert found == FOLDERS


def test_no_package_below_tests_shadows_ours() -> None:
    assert len(list((ROOT / "tests").rglob("test_*.py"))) >= 3
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_infra_holds_no_importable_python() -> None:
    assert not list((ROOT / "infra").rglob("*.py"))


def test_the_deployments_of_the_lab_are_declared() -> None:
    names = {f"{flow_of(deployment).name}/{deployment['name']}" for deployment in DEPLOYMENTS}
    assert len(names) == len(DEPLOYMENTS)
    assert names >= {
        *("reproduce/demo", "train-ldm/demo", "train-ldm/celebahq", "train-first-stage/demo"),
        *("encode-latents/demo", "download-shards/demo", "evaluate/demo", "evaluate/nightly"),
    }


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: f"{d['entrypoint']}-{d['name']}")
def test_an_entrypoint_is_the_module_path_of_a_flow_that_takes_the_parameters(
    deployment: dict[str, Any],
) -> None:
    assert re.fullmatch(r"flows(\.[a-z_]+)+", deployment["entrypoint"])
    flow = flow_of(deployment)
    assert isinstance(flow, prefect.Flow)
    inspect.signature(flow.fn).bind(**deployment["parameters"])
    flow.validate_parameters(deployment["parameters"])


def test_help_lists_every_target() -> None:
    [phony] = re.findall(
        r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    printed = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    listed = {words[0] for line in printed.splitlines() if (words := line.split())}
    assert (
        {"help", "setup", "lock", "demo", "check", "test", "test-slow", "bench"}
        <= set(phony.split())
        <= listed
    )


def test_decisions_are_numbered_without_a_gap_and_have_four_parts() -> None:
    assert len(DECISIONS) >= 9
    assert [path.name[:4] for path in DECISIONS] == [
        f"{number:04}" for number in range(1, len(DECISIONS) + 1)
    ]
    for path in DECISIONS:
        headings = re.findall(r"^## (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequences", "How it is held"], path.name


@pytest.mark.parametrize("script", ["infra/setup.sh", "infra/guarded.sh", ".ci/run"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o100
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
