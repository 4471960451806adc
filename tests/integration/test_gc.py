"""Garbage collection beside a real MLflow: an alias keeps a model, all it was made of, and its scores."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from datasets.store import Store

pytestmark = [pytest.mark.xdist_group("tiny chain"), pytest.mark.timeout(300)]
CHAIN = ("download-shards", "train-first-stage", "encode-latents", "train-ldm", "evaluate")
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def copied(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with an artifact of every stage, made by a run with overrides, and its MLflow."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


def stages(store: Path) -> set[str]:
    return {manifest.stage for manifest in Store(store).manifests()}


def forget(store: Path, name: str) -> None:
    """Take the alias `candidate` from a registered model."""
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{store / 'mlflow.db'}"
    MlflowClient(uri, uri).delete_registered_model_alias(name, "candidate")


def test_what_an_alias_leads_to_stays_until_it_is_taken_away(copied: Path, cli: Cli) -> None:
    before = stages(copied)
    assert before == {"url-list", *CHAIN}
    status, said, err = cli("gc", "--delete", "--store", str(copied))
    assert (status, stages(copied)) == (0, before), err
    assert "can go" in said
    forget(copied, "ldm-demo")
    status, said, _ = cli("gc", "--store", str(copied))
    assert status == 0
    assert all(f"\n{stage} " in f"\n{said}" for stage in ("encode-latents", "train-ldm", "evaluate"))
    assert stages(copied) == before
    assert cli("gc", "--delete", "--store", str(copied))[0] == 0
    assert stages(copied) == {"url-list", "download-shards", "train-first-stage"}
    forget(copied, "first-stage-cats-vq-f4")
    assert cli("gc", "--delete", "--store", str(copied))[0] == 0
    assert stages(copied) == set()


def test_without_an_answer_of_mlflow_nothing_goes(copied: Path, cli: Cli) -> None:
    before = stages(copied)
    (copied / "mlflow.db").write_bytes(b"damaged")
    status, _, err = cli("gc", "--delete", "--store", str(copied))
    assert (status, stages(copied)) == (2, before)
    assert "MLflow must say which models are in use, but sqlite:" in err


def test_models_of_another_mlflow_stay(copied: Path, cli: Cli) -> None:
    (copied / "mlflow.db").unlink()
    status, said, _ = cli("gc", "--delete", "--store", str(copied))
    assert status == 0
    assert said.count("tracked by an MLflow that is not") == 2
    assert {"train-first-stage", "train-ldm", "encode-latents"} <= stages(copied)
    assert not (copied / "mlflow.db").exists()


def test_no_work_area_is_left_when_all_is_made(tiny_store: Path) -> None:
    assert Store(tiny_store).work_areas() == {}
