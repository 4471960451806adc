"""Checkpoints hold the moment of the call, come back bit for bit, stay as promised, and fail aloud."""

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load
from torch import Tensor

from datasets.errors import CorruptionError, SpaceError
from datasets.store import Store, WorkArea
from ldm.config import Recipe
from ldm.errors import TrainingError
from ldm.stages.train_first_stage import TRAIN_FIRST_STAGE
from ldm.stages.train_ldm import TRAIN_LDM
from ldm.training.checkpoint import Checkpoint, Checkpoints, num_kept, saved
from ldm.training.serialised import DTYPES, serialised
from ldm.training.state import check_state, load_optimizer, module_tensors, optimizer_tensors

OF = {"training": {"lr": 0.001, "betas": (0.9, 0.999)}, "inputs": {"latents": "ab"}, "threads": 1}


@pytest.fixture
def work(tmp_path: Path) -> WorkArea:
    return Store(tmp_path).work("train", "0" * 64)


def checkpoint(step: int, *, size: int = 16) -> Checkpoint:
    return Checkpoint(
        step, {"weight": torch.full((size,), float(step))}, {"loss": [(step, 1.0 / (step + 1))]}
    )


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def odd_tensors() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    kinds = {
        f"of {name}": torch.randint(0, 2, (3, 5), generator=draws).to(dtype) for dtype, name in DTYPES.items()
    }
    return kinds | {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "channels last": torch.randn(2, 3, 4, 5, generator=draws).to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 6, generator=draws).T,
        "every other": torch.arange(10)[::2],
        "no numbers": torch.tensor([torch.nan, -torch.inf, -0.0]),
        "trained ü\n": torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16)),
    }


def test_tensors_of_every_type_and_layout_come_back_bit_for_bit() -> None:
    tensors = odd_tensors()
    back = load(bytes(serialised(tensors)))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(back[name]) == bits(tensor.detach()), name
    assert load(bytes(serialised({}))) == {}


def test_a_type_that_training_keeps_none_of_is_named() -> None:
    with pytest.raises(ValueError, match=r"F64, .* but phase is of torch\.complex64; convert"):
        serialised({"phase": torch.zeros(2, dtype=torch.complex64)})


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_what_was_saved_is_loaded_bit_for_bit(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = str(tmp_path / "store") if place == "folder" else f"memory://{tmp_path.name}"
    work = Store(uri).work("train", "0" * 64)
    draws = random.Random(0)
    history = {"loss": [(n, draws.uniform(0, 1) * 10 ** draws.randint(-30, 30)) for n in range(1000)]}
    with Checkpoints(work, of=OF) as checkpoints:
        assert checkpoints.load() is None
        checkpoints.save(Checkpoint(4, odd_tensors(), history, skipped=(1, 3)))
    found = Checkpoints(work, of=OF).load()
    assert found is not None
    assert (found.step, found.history, found.skipped) == (4, history, (1, 3))
    assert {name: bits(tensor) for name, tensor in found.tensors.items()} == {
        name: bits(tensor.detach()) for name, tensor in odd_tensors().items()
    }


def test_the_state_saved_is_that_of_the_call_though_training_goes_on(work: WorkArea) -> None:
    weight, history = torch.zeros(1_000_000), {"loss": [(0, 1.0)]}
    with Checkpoints(work) as checkpoints:
        for step in range(5):
            checkpoints.save(Checkpoint(step, {"weight": weight}, history))
            weight += 1
            history["loss"].append((step + 1, 0.5))
            history[f"metric {step}"] = []
            found = checkpoints.load()
            assert found is not None
            assert found.step == step
            assert torch.equal(found.tensors["weight"], torch.full((1_000_000,), float(step)))
            assert found.history["loss"][-1][0] == step
            assert len(found.history) == step + 1


def test_a_save_takes_the_size_of_the_state_once(work: WorkArea) -> None:
    state = {f"weight {i}": torch.ones(500_000) for i in range(20)}
    num_bytes = sum(tensor.nbytes for tensor in state.values())
    with Checkpoints(work) as checkpoints:
        checkpoints.save(Checkpoint(1, state, {}))
        checkpoints.wait()
        tracemalloc.start()
        checkpoints.save(Checkpoint(2, state, {}))
        checkpoints.wait()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert num_bytes <= peak < 1.1 * num_bytes


def test_the_newest_two_stay_and_the_first_after_each_multiple(work: WorkArea) -> None:
    with Checkpoints(work, keep_every=10) as checkpoints:
        for step in (3, 9, 12, 15, 19, 20, 24, 41, 43, 44, 47):
            checkpoints.save(checkpoint(step))
    assert saved(work) == [12, 20, 41, 44, 47]
    with Checkpoints(work) as checkpoints:
        checkpoints.save(checkpoint(48))
    assert saved(work) == [47, 48]


def test_two_good_ones_stay_when_a_damaged_one_was_passed_over(work: WorkArea) -> None:
    with Checkpoints(work) as checkpoints:
        for step in (6, 9, 12):
            checkpoints.save(checkpoint(step))
    work.write("checkpoint-000000012.safetensors", b"")
    with Checkpoints(work) as checkpoints:
        found = checkpoints.load()
        assert found is not None
        assert found.step == 9
        checkpoints.save(checkpoint(10))
        checkpoints.wait()
        assert saved(work) == [9, 10]
        assert checkpoints.incidents == ["checkpoint-000000012.safetensors must be a file of 136 bytes"]
    assert len(work.names()) == 4


def test_what_an_unfinished_save_left_is_passed_over_and_dropped_later(work: WorkArea) -> None:
    work.write("checkpoint-000000002.safetensors", b"as long as it got")
    with Checkpoints(work) as checkpoints:
        assert checkpoints.load() is None
        checkpoints.save(checkpoint(3))
    assert work.names() == ["checkpoint-000000003.json", "checkpoint-000000003.safetensors"]


def test_a_checkpoint_of_another_configuration_is_refused_and_every_field_named(work: WorkArea) -> None:
    with Checkpoints(work, of=OF) as checkpoints:
        checkpoints.save(checkpoint(1))
    other = {"training": {"lr": 0.002, "betas": [0.9, 0.999]}, "inputs": {"latents": "cd"}, "new": None}
    with pytest.raises(TrainingError) as refused:
        Checkpoints(work, of=other).load()
    assert "checkpoint-000000001.json is of another" in str(refused.value)
    assert (
        "; inputs.latents: the checkpoint has 'ab', this run needs 'cd'; new: the checkpoint has none, this "
        "run needs None; threads: the checkpoint has 1, this run needs none; training.lr: the checkpoint has "
        "0.001, this run needs 0.002; run the recipe it was made by"
    ) in str(refused.value)
    assert Checkpoints(work).load() is not None


def test_one_whose_configuration_is_unknown_is_refused(work: WorkArea) -> None:
    with Checkpoints(work) as checkpoints:
        checkpoints.save(checkpoint(1))
    with pytest.raises(TrainingError, match="threads: the checkpoint has none, this run needs 1"):
        Checkpoints(work, of=OF).load()


def lying(monkeypatch: pytest.MonkeyPatch, *, ending: str) -> WorkArea:
    """A work area on a disk that keeps other bytes than it is given for files of an ending."""
    stored = MemoryFileSystem.pipe_file

    def store_another(self: MemoryFileSystem, path: str, value: bytes, mode: Any = "overwrite") -> None:
        data = bytearray(value)
        data[-3] ^= path.endswith(ending)
        stored(self, path, bytes(data), mode=mode)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", store_another)
    return Store(f"memory://lying-{ending}").work("train", "0" * 64)


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_one_that_is_not_read_back_as_written_is_never_good(
    ending: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with Checkpoints(Store(f"memory://lying-{ending}").work("train", "0" * 64)) as checkpoints:
        checkpoints.save(checkpoint(1))
    work = lying(monkeypatch, ending=ending)
    checkpoints = Checkpoints(work)
    checkpoints.save(checkpoint(2))
    with pytest.raises(CorruptionError, match=f"lying.*000000002.{ending} is not; the checkpoint before"):
        checkpoints.wait()
    assert saved(work) == [1]
    assert len(work.names()) == 2
    work.clear()


def full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> WorkArea:
    """A work area that has no room."""
    monkeypatch.chdir(tmp_path)

    def refuse(self: MemoryFileSystem, path: str, value: bytes, **options: object) -> None:
        raise OSError(28, "No space left on device")

    work = Store("memory://full").work("train", "0" * 64)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    return work


def test_a_save_that_failed_is_raised_once_by_the_next_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(full(monkeypatch, tmp_path))
    for call in (checkpoints.wait, checkpoints.load, lambda: checkpoints.save(checkpoint(2))):
        checkpoints.save(checkpoint(1))
        with pytest.raises(SpaceError, match=r"needs more room than there is .* free space there"):
            call()
    checkpoints.wait()


def test_a_save_that_failed_is_raised_where_the_run_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SpaceError), Checkpoints(full(monkeypatch, tmp_path)) as checkpoints:
        checkpoints.save(checkpoint(1))


def save_and_raise(work: WorkArea, error: BaseException) -> None:
    """A run that ends by an exception right after a save has begun."""
    with Checkpoints(work) as checkpoints:
        checkpoints.save(checkpoint(1, size=1_000_000))
        raise error


def test_a_save_that_failed_does_not_hide_why_the_run_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TrainingError, match="loss"):
        save_and_raise(full(monkeypatch, tmp_path), TrainingError("loss must be finite"))
    assert "the last checkpoint could not be saved" in caplog.text


def test_the_last_save_is_finished_when_the_run_ends_by_an_exception(work: WorkArea) -> None:
    with pytest.raises(KeyboardInterrupt):
        save_and_raise(work, KeyboardInterrupt())
    assert saved(work) == [1]


def test_bad_numbers_in_a_history_are_no_checkpoint(work: WorkArea) -> None:
    with pytest.raises(ValueError, match="finite"), Checkpoints(work) as checkpoints:
        checkpoints.save(Checkpoint(1, {}, {"loss": [(1, float("nan"))]}))
    assert saved(work) == []


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


def state_of(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return module_tensors(module, "model") | optimizer_tensors(optimizer, "optimizer")


def test_a_state_that_fits_is_accepted_before_and_after_the_first_step() -> None:
    module, optimizer = trained()
    fresh = torch.nn.Linear(3, 2)
    fresh_optimizer = torch.optim.AdamW(fresh.parameters(), fused=True)
    first = state_of(fresh, fresh_optimizer)
    for found in (state_of(module, optimizer), first):
        check_state(found, first, optimizers={"optimizer": fresh_optimizer})
    load_optimizer(fresh_optimizer, state_of(module, optimizer), "optimizer")
    assert len(optimizer_tensors(fresh_optimizer, "optimizer")) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.bias": None}, "missing: model.bias; run the recipe"),
        ({"optimizer.1.step": None}, "missing: optimizer.1.step;"),
        ({"../model": torch.ones(1)}, "unknown to this run: ../model;"),
        ({"optimizer.2.step": torch.ones(1)}, "unknown to this run: optimizer.2.step;"),
        ({"optimizer.a": torch.ones(1)}, "unknown to this run: optimizer.a;"),
        ({"model.bias": torch.ones(3)}, r"type: model.bias is float32 \(3,\) instead of float32 \(2,\);"),
        ({"model.bias": torch.ones(2).half()}, r"model.bias is float16 \(2,\) instead of float32 \(2,\);"),
        ({"optimizer.0.exp_avg": torch.ones(3, 2)}, r"optimizer.0.exp_avg is float32 \(3, 2\) instead of"),
        ({f"{i}": torch.ones(1) for i in range(8)}, "unknown to this run: 0, 1, 2, 3, 4 and 3 more;"),
    ],
)
def test_a_state_that_does_not_fit_is_named(change: dict[str, Tensor | None], message: str) -> None:
    module, optimizer = trained()
    has = state_of(module, optimizer)
    found = {name: value for name, value in (has | change).items() if value is not None}
    with pytest.raises(TrainingError, match=message):
        check_state(found, has, optimizers={"optimizer": optimizer})


def test_which_checkpoints_stay_is_no_part_of_the_key_and_asks_for_room(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    recipe = tiny_recipe()
    keeping = tiny_recipe("training.keep_every_images=10", "first_stage.training.keep_every_images=10")
    assert (keeping.training.keep_every_steps, recipe.training.keep_every_steps) == (3, 0)
    assert (num_kept(recipe.training), num_kept(keeping.training)) == (3, 7)
    for stage in (TRAIN_FIRST_STAGE, TRAIN_LDM):
        assert stage.what(keeping) == stage.what(recipe)
        assert stage.need_bytes(keeping, {}) > stage.need_bytes(recipe, {})
