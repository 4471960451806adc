import torch
from torch.distributions import Normal, kl_divergence

from ldm.models.gaussian import LOGVAR_RANGE, kl_to_standard_normal, sample_posterior, split_moments


def some_moments() -> torch.Tensor:
    return torch.randn(3, 8, 5, 5, generator=torch.Generator().manual_seed(0))


def test_the_standard_normal_is_at_no_distance_from_itself() -> None:
    assert kl_to_standard_normal(torch.zeros(2, 6, 4, 4)).tolist() == [0.0, 0.0]


def test_the_distance_is_the_closed_form_summed_over_a_picture() -> None:
    moments = some_moments()
    mean, logvar = moments.chunk(2, dim=1)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(kl_to_standard_normal(moments), expected)


def test_draws_have_the_moments() -> None:
    moments = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 200, 200)  # mean, log-variance
    noise = torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    z = sample_posterior(moments, noise)
    torch.testing.assert_close(z.mean(), torch.tensor(2.0), atol=0.02, rtol=0)
    torch.testing.assert_close(z.var(), torch.tensor(-1.0).exp(), atol=0.01, rtol=0)


def test_no_noise_draws_the_mean() -> None:
    moments = some_moments()
    assert torch.equal(sample_posterior(moments, torch.zeros(3, 4, 5, 5)), split_moments(moments)[0])


def test_the_log_variance_is_clamped() -> None:
    moments = torch.tensor([0.0, 0.0, 1e3, -1e3]).view(1, 4, 1, 1)
    assert split_moments(moments)[1].flatten().tolist() == list(reversed(LOGVAR_RANGE))
    assert torch.isfinite(kl_to_standard_normal(moments)).all()
