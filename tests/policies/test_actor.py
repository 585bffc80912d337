"""The noise actor: its density, its start, its randomness."""

import math

import pytest
import torch
from torch import distributions as D

from trimtab.adapters import NoiseSpec, UserError
from trimtab.policies.actor import ActorConfig, NoiseActor, constant_actor, kl_to_prior
from trimtab.policies.networks import ClampInvertingGradients
from trimtab.policies.noise_samplers import base_noise, constant_noise, prior_noise, steered_noise, zero_noise
from trimtab.policies.noise_space import (
    ConstantNoiseConfig,
    FullNoiseConfig,
    RepeatNoiseConfig,
    ResidualNoiseConfig,
)

SPEC = NoiseSpec((4, 2))


def make_actor(bound=2.0, space=FullNoiseConfig, trained=True):
    torch.manual_seed(0)
    actor = NoiseActor(5, space(bound=bound).build(SPEC), ActorConfig(hidden=16, layers=2))
    if trained:
        torch.nn.init.normal_(actor.net[-1].weight, std=0.3)
    return actor


def test_log_prob_against_torch_distributions():
    actor = make_actor(bound=1.3).double()
    features = torch.randn(7, 5, dtype=torch.float64)
    drawn = actor.sample(features)
    base = D.Normal(drawn.mean, drawn.log_std.exp())
    scale = D.AffineTransform(0.0, 1 / 1.3)
    squashed = D.TransformedDistribution(base, [scale, D.TanhTransform(), D.AffineTransform(0.0, 1.3)])
    assert torch.allclose(drawn.log_prob, squashed.log_prob(drawn.u).sum(-1), atol=1e-6)


@pytest.mark.parametrize("mean_limit, clamp", [(0.9, False), (1.0, False), (1.0, True)])
def test_gradients_of_a_draw_against_torch_distributions(mean_limit, clamp):
    """Some means are beyond the limit, some deviations beyond their range."""
    torch.manual_seed(0)
    space = FullNoiseConfig(bound=1.3).build(SPEC)
    config = ActorConfig(hidden=8, layers=1, mean_limit=mean_limit, log_std_clamp=clamp)
    actor = NoiseActor(3, space, config).double()
    torch.nn.init.normal_(actor.net[-1].weight, std=2.0)
    features, eps = torch.randn(40, 3).double(), torch.randn(40, 8).double()
    drawn = actor.sample(features, eps)
    mean, raw = actor.net(features).chunk(2, 1)
    if mean_limit < 1.0:
        assert (mean.abs() > actor.limit).any()
        mean = ClampInvertingGradients.apply(mean, actor.limit)
    log_std = drawn.log_std
    if clamp:
        assert (raw > 1.0).any() and (raw < -5.0).any()
        log_std = raw.clamp(-5.0, 1.0)
    scale = D.AffineTransform(0.0, 1 / 1.3)
    squash = D.ComposeTransform([scale, D.TanhTransform(cache_size=1), D.AffineTransform(0.0, 1.3)])
    z = mean + log_std.exp() * eps
    density = D.Normal(mean, log_std.exp()).log_prob(z) - squash.log_abs_det_jacobian(z, squash(z))
    expected, weight = (squash(z), density.sum(1)), torch.randn(40, 1).double()
    for one, other in zip((drawn.u, drawn.log_prob), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-8)
        found = torch.autograd.grad(
            (one.reshape(40, -1) * weight).sum(), actor.net.parameters(), retain_graph=True
        )
        wanted = torch.autograd.grad(
            (other.reshape(40, -1) * weight).sum(), actor.net.parameters(), retain_graph=True
        )
        for gradient, by_hand in zip(found, wanted, strict=True):
            assert torch.allclose(gradient, by_hand, rtol=1e-7, atol=1e-9)


def test_starts_like_the_base():
    actor = make_actor(bound=2.0, trained=False)
    mean, log_std = actor(torch.randn(9, 5))
    assert mean.abs().max() == 0
    assert log_std.abs().max() < 1e-6
    features, prior = torch.randn(1000, 5), torch.randn(1000, 4, 2)
    noise = actor.act(features, prior)
    assert torch.allclose(noise, prior_noise(actor.space)(features, prior), atol=1e-6)
    assert torch.corrcoef(torch.stack([noise.flatten(), prior.flatten()]))[0, 1] > 0.98


def test_bound_holds_however_far_the_mean_goes():
    actor = make_actor(bound=1.5)
    torch.nn.init.constant_(actor.net[-1].bias, 40.0)
    features = torch.randn(20, 5)
    assert actor.sample(features).u.abs().max() <= 1.5
    assert actor.act(features, torch.randn(20, 4, 2), deterministic=True).abs().max() <= 1.5
    assert torch.isfinite(actor.sample(features).log_prob).all()


def test_act_is_decided_by_the_prior_draw():
    for space in (FullNoiseConfig, RepeatNoiseConfig):
        actor = make_actor(space=space)
        features, prior = torch.randn(3, 5), torch.randn(3, 4, 2)
        assert torch.equal(actor.act(features, prior), actor.act(features, prior))
        assert not torch.equal(actor.act(features, prior), actor.act(features, -prior))
        mean = actor.act(features, prior, deterministic=True)
        assert torch.equal(mean, actor.act(features, -prior, deterministic=True))


def test_kl_against_torch_distributions():
    mean, log_std = torch.randn(6, 4), torch.randn(6, 4) * 0.3
    expected = D.kl_divergence(D.Normal(mean, log_std.exp()), D.Normal(0.0, 1.0)).sum(-1)
    assert torch.allclose(kl_to_prior(mean, log_std), expected, atol=1e-5)
    expected = D.kl_divergence(D.Normal(mean, log_std.exp()), D.Normal(0.0, 0.5)).sum(-1)
    assert torch.allclose(kl_to_prior(mean, log_std, 0.5), expected, atol=1e-5)


def test_the_start_of_a_residual_is_no_delta():
    actor = make_actor(space=ResidualNoiseConfig, trained=False)
    mean, log_std = actor(torch.randn(9, 5))
    assert mean.abs().max() == 0
    assert torch.allclose(log_std, torch.full_like(log_std, math.log(0.1)), atol=1e-5)
    assert kl_to_prior(mean, log_std, actor.space.initial_std).abs().max() < 1e-4
    prior = torch.randn(500, 4, 2)
    assert torch.equal(actor.act(torch.randn(500, 5), prior, deterministic=True), prior)
    noise = actor.act(torch.randn(500, 5), prior)
    assert 0.09 < (noise - prior).std() < 0.11


# The mean stays where tanh still has a slope.


def test_the_limit_is_the_identity_inside():
    features = torch.randn(50, 5)
    limited, free = make_actor(), make_actor()
    free.limit = None
    for one, other in zip(limited(features), free(features), strict=True):
        assert torch.equal(one, other)
    drawn = [actor.sample(features, torch.ones(50, 8)) for actor in (limited, free)]
    for actor, out in zip((limited, free), drawn, strict=True):
        (out.log_prob - out.u.sum(-1)).sum().backward()
        assert actor.net[0].weight.grad.abs().max() > 0
    assert torch.equal(limited.net[0].weight.grad, free.net[0].weight.grad)


def test_the_mean_never_passes_the_limit():
    actor = make_actor(bound=1.5)
    torch.nn.init.constant_(actor.net[-1].bias, 1e6)
    u = actor.space.squash(actor(torch.randn(20, 5))[0])
    assert torch.allclose(u.abs().max(), torch.tensor(0.98 * 1.5))


def test_gradients_at_the_limit():
    x = torch.tensor([0.5, -0.5, 3.0, 3.0, -3.0, -3.0, 9.0, 2.0, 2.0], requires_grad=True)
    grad = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    y = ClampInvertingGradients.apply(x, 2.0)
    assert torch.equal(y, x.clamp(-2.0, 2.0))
    y.backward(grad)
    # Inside and inward: whole. Outward: turned round by the overshoot, at most whole; 0 at the limit.
    assert torch.equal(x.grad, torch.tensor([1.0, -1.0, 1.0, 0.5, -0.5, -1.0, 1.0, 0.0, 1.0]))


def come_back(mean_limit):
    """Updates until u < 0 everywhere, after 300 updates towards +, and where the mean was by then."""
    torch.manual_seed(0)
    space = FullNoiseConfig().build(SPEC)
    actor = NoiseActor(5, space, ActorConfig(hidden=32, layers=2, mean_limit=mean_limit))
    optimizer, features = torch.optim.Adam(actor.parameters(), lr=3e-3), torch.randn(64, 5)

    def step(sign):
        drawn = actor.sample(features)
        optimizer.zero_grad()
        (1e-3 * drawn.log_prob - sign * drawn.u.sum(-1)).mean().backward()
        optimizer.step()

    for _ in range(300):
        step(1.0)
    raw = actor.net(features)[:, :8].abs().max()
    count = 0
    while space.squash(actor(features)[0]).max() >= 0:
        step(-1.0)
        count += 1
    return count, float(raw.detach())


def test_an_actor_at_the_bound_comes_back():
    (free, far), (limited, near) = come_back(1.0), come_back(0.98)
    assert limited < 0.75 * free
    assert near < 2.0 * (2.0 * math.atanh(0.98)) < 0.5 * far


# One noise for all observations.


def test_a_constant_actor_does_not_look():
    actor = make_actor(space=ConstantNoiseConfig, trained=False)
    prior = torch.randn(3, 4, 2)
    assert torch.equal(actor.act(torch.randn(3, 5), prior), actor.act(torch.full((3, 5), torch.nan), prior))
    assert sum(parameter.numel() for parameter in actor.parameters()) == 2 * 8
    actor.normalizer.fit(torch.randn(10, 5))
    out = actor.sample(torch.randn(3, 5))
    (out.u.sum() + out.log_prob.sum()).backward()
    assert actor.net[-1].bias.grad.abs().min() > 0


@pytest.mark.parametrize("ticket", ["full", "repeat"])
def test_an_actor_of_one_noise(ticket):
    noise = torch.randn(4, 2)
    if ticket == "repeat":
        noise = noise[:1].expand(4, 2).contiguous()
    space = ConstantNoiseConfig(bound=1.05 * float(noise.abs().max()), ticket=ticket).build(SPEC)
    actor = constant_actor(noise, space)
    features, prior = torch.randn(3, 7), torch.randn(3, 4, 2)
    assert torch.allclose(actor.act(features, prior, deterministic=True), noise.expand(3, 4, 2), atol=1e-5)
    assert (actor.act(features, prior) - noise).abs().max() < 0.05


def test_noise_that_a_constant_actor_cannot_make():
    noise = torch.zeros(4, 2)
    noise[1] = 3.0
    with pytest.raises(UserError, match=r"--noise.bound: .*reaches 3.00, an actor here 1\.96"):
        constant_actor(noise, ConstantNoiseConfig().build(SPEC))
    with pytest.raises(UserError, match=r"--noise.type: .*cannot make"):
        constant_actor(noise, ConstantNoiseConfig(bound=9.0, ticket="repeat").build(SPEC))
    with pytest.raises(ValueError, match="of the type 'constant'"):
        constant_actor(noise, FullNoiseConfig(bound=9.0).build(SPEC))


def test_sources():
    features, prior = torch.randn(3, 5), torch.randn(3, 4, 2)
    assert torch.equal(base_noise(features, prior), prior)
    assert zero_noise(features, prior).abs().max() == 0
    ticket = torch.randn(4, 2)
    assert torch.equal(constant_noise(ticket)(features, prior), ticket.expand(3, 4, 2))
    actor = make_actor()
    assert torch.equal(steered_noise(actor)(features, prior), actor.act(features, prior))
