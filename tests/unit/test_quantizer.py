import pytest
import torch
from torch import Tensor

from ldm.models import quantizer as quantizer_module
from ldm.models.quantizer import VectorQuantizer


def some_quantizer(num_codes: int = 16, channels: int = 3, *, beta: float = 0.25) -> VectorQuantizer:
    quantizer = VectorQuantizer(num_codes, channels, beta=beta)
    with torch.no_grad():
        quantizer.embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    return quantizer


def some_latents(*, batch: int = 2, channels: int = 3, side: int = 4) -> Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


def test_every_position_takes_the_nearest_code() -> None:
    quantizer, z = some_quantizer(), some_latents()
    flat = z.permute(0, 2, 3, 1).reshape(-1, 3)
    nearest = torch.cdist(flat, quantizer.embedding.weight.detach()).argmin(1).view(2, 4, 4)
    quantized = quantizer(z)
    assert torch.equal(quantized.indices, nearest)
    torch.testing.assert_close(quantized.latent, quantizer.lookup(nearest))


def test_a_code_is_its_own_nearest() -> None:
    quantizer = some_quantizer()
    indices = torch.arange(16).view(1, 4, 4)
    assert torch.equal(quantizer.nearest(quantizer.lookup(indices)), indices)


@pytest.mark.parametrize("max_distances", [1, 100, 2**20])
def test_searching_in_parts_finds_the_same_codes(max_distances: int, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, z = some_quantizer(num_codes=48, channels=4), some_latents(batch=3, channels=4, side=8)
    flat, codes = z.permute(0, 2, 3, 1).reshape(-1, 4), quantizer.embedding.weight.detach()
    whole = (codes.square().sum(1) - 2.0 * flat @ codes.t()).argmin(1).view(3, 8, 8)
    monkeypatch.setattr(quantizer_module, "MAX_DISTANCES", max_distances)
    assert torch.equal(quantizer.nearest(z), whole)


def test_of_equally_near_codes_the_first_is_taken() -> None:
    quantizer = some_quantizer()
    with torch.no_grad():
        quantizer.embedding.weight[8:] = quantizer.embedding.weight[:8]
    assert int(quantizer.nearest(some_latents()).max()) < 8


def test_the_decoders_gradient_passes_unchanged_to_the_encoder() -> None:
    quantizer, z = some_quantizer(), some_latents().requires_grad_()
    of_decoder = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    quantizer(z).latent.backward(of_decoder)
    assert z.grad is not None
    assert torch.equal(z.grad, of_decoder)
    assert quantizer.embedding.weight.grad is None


def test_the_loss_pulls_latents_to_codes_and_beta_times_as_hard_codes_to_latents() -> None:
    quantizer, z = some_quantizer(beta=0.25), some_latents().requires_grad_()
    quantized = quantizer(z)
    codes = quantizer.lookup(quantized.indices).detach()
    torch.testing.assert_close(quantized.loss, 1.25 * (z - codes).square().mean())
    quantized.loss.backward()
    torch.testing.assert_close(z.grad, 2 * (z.detach() - codes) / z.numel())
    pulled = torch.zeros_like(quantizer.embedding.weight)
    back = 0.25 * 2 * (codes - z.detach()) / z.numel()
    pulled.index_add_(0, quantized.indices.flatten(), back.permute(0, 2, 3, 1).reshape(-1, 3))
    torch.testing.assert_close(quantizer.embedding.weight.grad, pulled)


def test_dead_codes_move_onto_latents_and_the_others_stay() -> None:
    quantizer, z = some_quantizer(), some_latents()
    before = quantizer.embedding.weight.detach().clone()
    dead = torch.zeros(16, dtype=torch.bool)
    dead[[3, 7, 8]] = True
    quantizer.revive(dead, z, torch.Generator().manual_seed(3))
    after = quantizer.embedding.weight.detach()
    assert torch.equal(after[~dead], before[~dead])
    flat = z.permute(0, 2, 3, 1).reshape(-1, 3)
    assert (torch.cdist(after[dead], flat).amin(1) == 0).all()
