"""Noise spaces: shapes, bounds, and a start that samples like the base."""

import pytest
import torch

from trimtab.adapters import NoiseSpec, UserError
from trimtab.policies.noise_space import FullNoiseConfig, RepeatNoiseConfig

SPEC = NoiseSpec((6, 3))


@pytest.mark.parametrize("config, dim", [(FullNoiseConfig(bound=1.7), 18), (RepeatNoiseConfig(bound=1.7), 3)])
def test_expand_and_project_are_inverse_within_the_bound(config, dim):
    space = config.build(SPEC)
    assert space.dim == dim
    u = (torch.rand(5, dim) * 2 - 1) * space.bound
    noise = space.expand(u, torch.randn(5, 6, 3))
    assert noise.shape == (5, 6, 3)
    assert torch.equal(space.project(noise), u)
    assert space.project(noise * 100).abs().max() <= space.bound


def test_repeat_is_the_same_at_every_step():
    noise = RepeatNoiseConfig().build(SPEC).expand(torch.randn(4, 3), torch.zeros(4, 6, 3))
    assert torch.equal(noise, noise[:, :1].expand_as(noise))


def test_squash_is_bounded_and_nearly_the_identity_inside():
    space = FullNoiseConfig(bound=2.0).build(SPEC)
    z = torch.linspace(-50, 50, 1001, dtype=torch.float64)
    assert space.squash(z).abs().max() <= 2.0
    assert (space.squash(z) - z)[z.abs() < 0.3].abs().max() < 3e-3


def test_log_slope_is_the_derivative_of_squash():
    space = FullNoiseConfig(bound=1.5).build(SPEC)
    z = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(space.squash(z).sum(), z)
    assert torch.allclose(space.log_slope(z), slope.log(), atol=1e-9)
    assert torch.isfinite(space.log_slope(torch.tensor([400.0, -400.0]))).all()


def test_bad_settings():
    with pytest.raises(UserError, match=r"--noise.bound: the bound must be positive"):
        FullNoiseConfig(bound=0.0)
    with pytest.raises(UserError, match=r"--noise.type: repeat needs noise of shape"):
        RepeatNoiseConfig().build(NoiseSpec((12,)))
