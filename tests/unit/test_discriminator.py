import pytest
import torch

from ldm.models.discriminator import PatchDiscriminator, hinge_loss


# the reference implementation's counts: 64 channels, 3 and 2 layers
@pytest.mark.parametrize(("num_layers", "expected"), [(3, 2_765_633), (2, 663_361)])
def test_the_published_sizes(num_layers: int, expected: int) -> None:
    with torch.device("meta"):
        model = PatchDiscriminator(64, num_layers)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(("num_layers", "side"), [(1, 14), (2, 6), (3, 2)])
def test_one_logit_per_patch(num_layers: int, side: int) -> None:
    assert PatchDiscriminator(4, num_layers)(torch.zeros(2, 3, 32, 32)).shape == (2, 1, side, side)


def test_weights_start_near_zero_and_scales_near_one() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(32, 3)
    convolutions = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, torch.nn.Conv2d)])
    scales = torch.cat([m.weight for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)])
    torch.testing.assert_close(convolutions.std(), torch.tensor(0.02), atol=5e-4, rtol=0)
    torch.testing.assert_close(scales.mean(), torch.tensor(1.0), atol=5e-3, rtol=0)
    torch.testing.assert_close(scales.std(), torch.tensor(0.02), atol=5e-3, rtol=0)


def test_hinge_asks_for_a_margin_of_one_on_both_sides_and_no_more() -> None:
    real, fake = torch.tensor([2.0, 1.0]), torch.tensor([-1.0, -7.0])
    assert hinge_loss(real, fake).item() == 0.0
    assert hinge_loss(torch.zeros(2), torch.zeros(2)).item() == 1.0
    assert hinge_loss(torch.tensor([-1.0]), torch.tensor([2.0])).item() == pytest.approx(2.5)
