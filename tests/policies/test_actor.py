"""The noise actor: its density, its start, its randomness."""

import torch
from torch import distributions as D

from trimtab.adapters import NoiseSpec
from trimtab.policies.actor import ActorConfig, NoiseActor, kl_to_prior
from trimtab.policies.noise_space import FullNoiseConfig, RepeatNoiseConfig
from trimtab.policies.sources import base_noise, constant_noise, prior_noise, steered_noise, zero_noise

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


def test_sources():
    features, prior = torch.randn(3, 5), torch.randn(3, 4, 2)
    assert torch.equal(base_noise(features, prior), prior)
    assert zero_noise(features, prior).abs().max() == 0
    ticket = torch.randn(4, 2)
    assert torch.equal(constant_noise(ticket)(features, prior), ticket.expand(3, 4, 2))
    actor = make_actor()
    assert torch.equal(steered_noise(actor)(features, prior), actor.act(features, prior))
