import pytest
import torch

from ldm.training.ema import Ema, ema_decay


def test_early_updates_forget_fast_and_late_ones_at_the_limit() -> None:
    published = [(1 + n) / (10 + n) for n in (1, 2, 3)]  # n counts updates from 1
    assert [ema_decay(0.9999, step) for step in range(3)] == pytest.approx(published)
    assert ema_decay(0.9999, 10**6) == 0.9999
    assert ema_decay(0.1, 0) == 0.1


@pytest.mark.parametrize("limit", [0.9999, 0.5])
def test_the_average_is_the_weighted_sum_of_all_past_weights(limit: float) -> None:
    weights = torch.randn(13, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameter = weights[0].clone()
    ema = Ema({"w": parameter}, decay=limit)
    for step, weight in enumerate(weights[1:]):
        parameter.copy_(weight)
        ema.update(step)
    decays = torch.tensor([ema_decay(limit, step) for step in range(12)], dtype=torch.float64)
    kept = torch.cat([decays.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])
    shares = torch.cat([kept[:1], (1 - decays) * kept[1:]])  # of the start, then of each update
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(ema.averages["w"], shares @ weights)


def test_the_average_starts_as_a_copy_of_the_weights() -> None:
    parameter = torch.ones(3)
    ema = Ema({"w": parameter}, decay=0.9)
    parameter.zero_()
    assert ema.averages["w"].tolist() == [1.0, 1.0, 1.0]


def test_without_decay_the_average_is_the_weights() -> None:
    parameter = torch.full((3,), 0.1)
    ema = Ema({"w": parameter}, decay=0.0)
    parameter.fill_(0.3)
    ema.update(5)
    assert torch.equal(ema.averages["w"], parameter)
