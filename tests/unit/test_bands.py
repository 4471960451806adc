"""Coding in bands gives what coding whole gives, in the memory that was counted."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.errors import ContractError
from ldm.first_stage_config import FirstStageModel
from ldm.model import Autoencoder
from ldm.models import autoencoder, quantizer
from ldm.models.autoencoder import AttnBlock
from ldm.models.band_plan import GIB, Coding, peak_bytes, plan_rows
from ldm.models.bands import (
    MIN_ROWS,
    decode_in_bands,
    encode_in_bands,
    held,
    normalisation,
    seam_levels,
)
from ldm.models.first_stage import FirstStage, IdentityModel, KLModel, VQModel, build_first_stage
from ldm.models.quantizer import VectorQuantizer

LAYOUTS: dict[str, dict[str, Any]] = {
    "f1": {"kind": "kl", "channel_mult": (1,)},
    "f2": {"kind": "vq", "channel_mult": (1, 2)},
    "f2 with attention everywhere": {"kind": "kl", "channel_mult": (1, 2), "attention_factors": (1, 2)},
    "f4": {"kind": "vq", "channel_mult": (1, 2, 4), "num_res_blocks": 2},
    "f4 with attention in between": {"kind": "kl", "channel_mult": (2, 1, 2), "attention_factors": (2,)},
    "f8": {"kind": "kl", "channel_mult": (1, 2, 2, 4), "attention_factors": (8,)},
    "f8 without any attention": {"kind": "vq", "channel_mult": (1, 1, 2, 2), "mid_attention": False},
    "f16": {"kind": "kl", "channel_mult": (1, 1, 2, 2, 4), "attention_factors": (8, 16)},
}
HEIGHT, WIDTH = 48, 32


def some_config(name: str) -> FirstStageModel:
    codes = 16 if LAYOUTS[name]["kind"] == "vq" else None
    common = {"channels": 8, "num_res_blocks": 1, "norm_groups": 4, "num_codes": codes}
    return FirstStageModel.model_validate(common | LAYOUTS[name])


def some_model(name: str) -> VQModel | KLModel:
    """Random weights, the biases too."""
    torch.manual_seed(0)
    model = build_first_stage(some_config(name))
    assert isinstance(model, VQModel | KLModel)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def pictures(count: int = 2) -> Tensor:
    """Noise on a ramp from black to white, so that no band has the statistics of the whole."""
    noise = torch.rand(count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    ramp = torch.linspace(-1, 1, HEIGHT)[:, None]
    return (0.7 * ramp + 0.3 * (2 * noise - 1)).contiguous(memory_format=torch.channels_last)


def require_same(model: FirstStage, x: Tensor, rows: int) -> None:
    stored = model.encode(x)
    found = encode_in_bands(model, x, rows=rows)
    assert found.shape == stored.shape
    assert (found - stored).abs().max() <= 1e-4 * stored.abs().max()
    z = model.latent(stored, None)
    seam = seam_levels(decode_in_bands(model, z, rows=rows), model.decode(z), rows=rows)
    assert seam.at_borders <= seam.largest < 0.05


@pytest.mark.parametrize("rows", [2, 3, 5, 16, 31, 100])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_bands_give_what_the_whole_gives(name: str, rows: int) -> None:
    require_same(some_model(name), pictures(), rows)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 60), height=st.integers(1, 7), width=st.integers(1, 5))
def test_bands_give_what_the_whole_gives_at_any_size(rows: int, height: int, width: int) -> None:
    model = some_model("f4")
    require_same(model, torch.nn.functional.interpolate(pictures(1), (4 * height, 4 * width)), rows)


def test_the_identity_has_nothing_to_do() -> None:
    x = pictures()
    assert torch.equal(encode_in_bands(IdentityModel(), x, rows=5), x)
    assert torch.equal(decode_in_bands(IdentityModel(), x, rows=5), x)


def test_what_is_coded_is_left_as_it_was() -> None:
    model, x = some_model("f4"), pictures()
    z = model.latent(model.encode(x), None)
    before = x.clone(), z.clone()
    encode_in_bands(model, x, rows=4)
    decode_in_bands(model, z, rows=4)
    assert torch.equal(x, before[0])
    assert torch.equal(z, before[1])


def test_statistics_keep_their_precision_far_from_zero() -> None:
    x = 1000.0 + pictures(1)[:, :1].repeat(1, 8, 1, 1) * torch.arange(1.0, 9.0)[:, None, None]
    norm = nn.GroupNorm(4, 8, eps=1e-6).requires_grad_(False)
    source = held(x)
    affine = normalisation(norm, HEIGHT, 7, lambda top, bottom: source.read(top, bottom).x)
    exact = nn.functional.group_norm(x.double(), 4, eps=1e-6)
    found = x.double() * affine.scale.double() + affine.shift.double()
    assert (found - exact).abs().max() < 1e-3


def test_a_band_has_as_many_rows_as_its_neighbour_reads() -> None:
    with pytest.raises(ValueError, match="at least 2 rows, got 1; give more rows"):
        decode_in_bands(some_model("f2"), torch.zeros(1, 3, 4, 4), rows=1)


def test_the_seam_metric_counts_in_levels_and_looks_at_borders_apart() -> None:
    whole = torch.zeros(1, 3, 12, 4)
    banded = whole.clone()
    banded[0, 0, 2, 1] = 2 / 255
    banded[0, 1, 5, 3] = -1 / 255
    assert seam_levels(banded, whole, rows=5) == pytest.approx((1.0, 0.5))
    assert seam_levels(banded, whole, rows=12) == pytest.approx((1.0, 0.0))


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.known: set[int] = set()

    def forget(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.now -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, num_bytes = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                weakref.finalize(storage, self.forget, key, num_bytes)
                self.now += num_bytes
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, num_bytes)
        return result


@pytest.mark.parametrize("rows", [2, 9, 24])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_the_counted_peak_is_that_of_the_tensors_or_up_to_half_more(name: str, rows: int) -> None:
    model, config, x = some_model(name), some_config(name), pictures(1)
    z = model.latent(model.encode(x), None)
    works: dict[Coding, Callable[[], object]] = {
        "encode": lambda: encode_in_bands(model, x, rows=rows),
        "decode": lambda: decode_in_bands(model, z, rows=rows),
    }
    for coding, work in works.items():
        with Live() as live:
            work()
        counted = peak_bytes(config, HEIGHT, WIDTH, rows=rows, coding=coding)
        assert live.peak <= counted <= 1.5 * live.peak, coding


def test_the_doubled_map_never_exists_whole() -> None:
    model, config = some_model("f4"), some_config("f4")
    z = model.latent(model.encode(pictures(1)), None)
    with Live() as live:
        decode_in_bands(model, z, rows=4)
    one_map = 4 * config.channels * HEIGHT * WIDTH
    assert live.largest == one_map  # the widest finished map; the doubled one has twice the channels
    with Live() as live:
        model.decode(z)
    assert live.largest == 2 * one_map


def test_the_plan_takes_the_most_rows_that_fit() -> None:
    config = some_config("f4")
    for coding in ("encode", "decode"):
        for rows in (2, 3, 17, 90):
            budget = peak_bytes(config, 128, 96, rows=rows, coding=coding)
            found = plan_rows(config, 128, 96, budget_bytes=budget, coding=coding)
            assert found >= rows
            assert peak_bytes(config, 128, 96, rows=found, coding=coding) <= budget
            assert found == 128 or peak_bytes(config, 128, 96, rows=found + 1, coding=coding) > budget
    assert plan_rows(FirstStageModel(kind="identity"), 8, 8, budget_bytes=0, coding="encode") == 8


def test_a_budget_too_small_names_the_smallest_that_works() -> None:
    config = some_config("f4")
    need = peak_bytes(config, 1024, 2048, rows=MIN_ROWS, coding="decode")
    pattern = (
        rf"decode 1 x 2048x1024 px in bands of 2 rows, the smallest, needs {need / GIB:.4g} GiB.*"
        r"budget of 0.01 GiB; give at least (0\.\d+) GiB"
    )
    with pytest.raises(ContractError, match=pattern) as caught:
        plan_rows(config, 1024, 2048, budget_bytes=0.01 * GIB, coding="decode")
    named = float(str(caught.value).split()[-2])
    assert plan_rows(config, 1024, 2048, budget_bytes=named * GIB, coding="decode") >= MIN_ROWS


def test_an_autoencoder_works_within_a_budget_of_memory() -> None:
    config, x = some_config("f4"), pictures()
    model = Autoencoder(some_model("f4"), config)
    z = model.encode(x)
    least = max(peak_bytes(config, HEIGHT, WIDTH, rows=5, coding=c, batch=2) for c in ("encode", "decode"))
    torch.testing.assert_close(model.encode(x, memory_gib=least / GIB), z, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.decode(z, memory_gib=least / GIB), model.decode(z), rtol=0, atol=1e-4)
    with pytest.raises(ContractError, match="to encode 2 x 32x48 px"):
        model.encode(x, memory_gib=1e-6)
    with pytest.raises(ContractError, match="to decode 2 x 32x48 px"):
        model.decode(z, memory_gib=0)


def test_attention_in_parts_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block, x = AttnBlock(8, groups=4).requires_grad_(False), torch.randn(2, 8, 12, 5)
    whole = block(x)
    monkeypatch.setattr(autoencoder, "MAX_QUERIES", 17)  # three rows of five
    torch.testing.assert_close(block(x), whole, rtol=1e-5, atol=1e-6)


def test_codes_are_found_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    quantize, z = VectorQuantizer(16, 3, beta=0.25), torch.randn(2, 3, 5, 4)
    whole = quantize.nearest(z)
    monkeypatch.setattr(quantizer, "MAX_DISTANCES", 16 * 7)
    assert torch.equal(quantize.nearest(z), whole)
