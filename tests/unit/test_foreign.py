"""Foreign checkpoints come back tensor for tensor as torch.save wrote them."""

import hashlib
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.bridge.foreign import DTYPES, read_checkpoint
from ldm.errors import CheckpointError


def saved(path: Path, value: Any, *, protocol: int = 2) -> Path:
    torch.save(value, path, pickle_protocol=protocol)
    return path


def assert_same(received: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(received) == list(expected)
    for key, tensor in expected.items():
        assert received[key].dtype == tensor.dtype
        assert received[key].shape == tensor.shape
        assert received[key].is_contiguous()
        assert torch.equal(received[key], tensor)


def random_state(*, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "model.bias": torch.randn(4, generator=generator),
        "steps": torch.tensor(7),
    }


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    numbers = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).mul(9)
    state = {"a": numbers.abs().to(torch.uint8).to(dtype) if dtype is torch.uint8 else numbers.to(dtype)}
    assert_same(read_checkpoint(saved(tmp_path / "a.pt", state)).tensors, state)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_reads_as_torch_load_does(tmp_path: Path, protocol: int) -> None:
    path = saved(tmp_path / "a.ckpt", {"state_dict": random_state(), "epoch": 3}, protocol=protocol)
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.tensors, torch.load(path, weights_only=protocol == 2)["state_dict"])
    assert checkpoint.facts == {"epoch": 3}
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_views_come_back_as_contiguous_tensors_that_share_no_memory(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    state = {
        "all": base,
        "transposed": base.permute(2, 0, 1),
        "every other": base[:, ::2, 1:4],
        "last": base[2, 3, 4],
        "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "empty": torch.empty(0, 4),
        "empty part": base[3:],
        "nothing at all": torch.empty(0),
    }
    tensors = read_checkpoint(saved(tmp_path / "a.pt", state)).tensors
    assert_same(tensors, state)
    tensors["all"].zero_()
    tensors["expanded"][0].zero_()
    assert torch.equal(tensors["transposed"], state["transposed"])
    assert tensors["expanded"][1].tolist() == [1.0, 2.0]


def test_a_modules_state_dict_and_its_parameters_read_alike(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    state = module.state_dict()
    assert isinstance(state, OrderedDict)
    assert hasattr(state, "_metadata")
    assert_same(read_checkpoint(saved(tmp_path / "a.pt", state)).tensors, dict(state))
    parameters = dict(module.named_parameters())
    assert_same(read_checkpoint(saved(tmp_path / "b.pt", parameters)).tensors, parameters)


@pytest.fixture
def lightning_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file as Lightning writes it, of classes that are gone when it is read."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)

    class ModelCheckpoint(dict):
        """A callback; a dict, so that its pickle has items as well as state."""

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = name, "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint  # pyright: ignore[reportAttributeAccessIssue]
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    callback = ModelCheckpoint(monitor="val/rec_loss")
    callback.__dict__["best"] = np.float64(0.25)
    path = saved(
        tmp_path / "model.ckpt",
        {
            "epoch": 5,
            "global_step": 1234,
            "pytorch-lightning_version": "1.4.2",
            "best_score": np.float32(0.5),
            "state_dict": OrderedDict(random_state()),
            "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.25)}, "object": callback},
            "optimizer_states": [
                {"state": {0: {"exp_avg": torch.full((2,), 0.1)}}, "param_groups": [{"params": [0]}]}
            ],
            "lr_schedulers": [],
            "hyper_parameters": {(1, 2): {3, 4}, "big": 1 << 200, "array": np.arange(3), "raw": b"bytes"},
        },
    )
    monkeypatch.undo()
    return path


def test_lightning_file_needs_none_of_its_classes(lightning_file: Path) -> None:
    before = set(sys.modules)
    checkpoint = read_checkpoint(lightning_file)
    assert_same(checkpoint.tensors, random_state())
    assert checkpoint.facts == {"epoch": 5, "global_step": 1234, "pytorch-lightning_version": "1.4.2"}
    assert not any(name.startswith("pytorch_lightning") for name in set(sys.modules) - before)
    with pytest.raises(ModuleNotFoundError, match="pytorch_lightning"):
        torch.load(lightning_file, weights_only=False)


def test_damage_in_an_optimizer_that_is_not_read_does_not_matter(lightning_file: Path) -> None:
    data = lightning_file.read_bytes()
    average = np.full(2, 0.1, np.float32)
    assert data.count(average.tobytes()) == 1
    lightning_file.write_bytes(data.replace(average.tobytes(), (average * 2).tobytes()))
    assert_same(read_checkpoint(lightning_file).tensors, random_state())


def test_safetensors_come_back_with_their_metadata(tmp_path: Path) -> None:
    state = {**random_state(), "half": torch.ones(2).half(), "flags": torch.tensor([True, False])}
    path = tmp_path / "model.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    checkpoint = read_checkpoint(path)
    assert_same(
        {key: checkpoint.tensors[key] for key in sorted(state)}, {key: state[key] for key in sorted(state)}
    )
    assert checkpoint.facts == {"format": "pt"}
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_safetensors_do_not_change_with_their_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(64)}, path)
    tensors = read_checkpoint(path).tensors
    with path.open("r+b") as stream:
        stream.seek(-64 * 4, 2)
        stream.write(bytes(64 * 4))
    assert torch.equal(tensors["a"], torch.ones(64))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"state_dict": {"a": torch.ones(1), "b": 3, "c": [1]}}, r"tensors alone; 'b' \(int\), 'c' \(list\)"),
        ({"model": {"a": torch.ones(1)}}, r"tensors alone; 'model' \(dict\); download it again, or save its"),
        ({"state_dict": {f"k{n}": n for n in range(12)}}, r"'k9' \(int\) and 2 more"),
        ({"state_dict": {1: torch.ones(1)}}, "keys of its state dict must be printable text; int"),
        ({"state_dict": {"a\nb": torch.ones(1)}}, r"printable text; 'a\\nb'"),
        ({"state_dict": [torch.ones(1)]}, "state_dict must be a mapping, and is list"),
        ({"state_dict": {}, "epoch": 3}, "its state dict is empty"),
        (torch.ones(2), "must hold a state dict, and holds View"),
        ({"a": np.ones(2)}, r"'a' \(<numpy\._?core\.multiarray\._reconstruct>\)"),
        ({"a": torch.eye(2).to_sparse()}, r"'a' \(<torch\._utils\._rebuild_sparse_tensor>\)"),
        ({"a": torch.ones(2, dtype=torch.complex64).conj()}, r"'a' \(<torch\._utils\._rebuild_tensor_v2>\)"),
        ({"a": torch.ones(2, device="meta")}, r"'a' \(<torch\._utils\._rebuild_meta"),
        ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, r"'a' \(<torch\._utils\._rebuild_tensor_v3>\)"),
    ],
    ids=range(13),
)
def test_what_is_no_state_dict_of_tensors_is_named(tmp_path: Path, value: Any, message: str) -> None:
    path = saved(tmp_path / "a.pt", value)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)


def test_other_formats_are_refused_with_the_cure(tmp_path: Path) -> None:
    cure = r"save its state dict again with torch\.save \(torch 1\.6 or later\)"
    legacy = tmp_path / "legacy.pt"
    torch.save(random_state(), legacy, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=rf"bare pickle, as torch wrote before 1\.6; .*{cure}"):
        read_checkpoint(legacy)
    (tmp_path / "other.pt").write_bytes(b"GIF89a-----")
    with pytest.raises(CheckpointError, match=rf"begins with b'GIF8'; .*{cure}"):
        read_checkpoint(tmp_path / "other.pt")
    save_file(random_state(), tmp_path / "renamed.pt")
    with pytest.raises(CheckpointError, match=r"its name does not end in \.safetensors"):
        read_checkpoint(tmp_path / "renamed.pt")
    for path in (tmp_path / "absent.ckpt", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="no such file"):
            read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_is_refused_with_the_cure(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "scripted.pt"))
    with pytest.raises(CheckpointError, match=r"TorchScript archive; .* save its state dict again"):
        read_checkpoint(tmp_path / "scripted.pt")


def test_plain_pickles_of_other_things_hold_no_state_dict(tmp_path: Path) -> None:
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError, match="bare pickle"):
        read_checkpoint(tmp_path / "list.pkl")
