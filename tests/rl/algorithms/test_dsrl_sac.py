"""DSRL-SAC: every loss against a hand-written reference, and gradients that go where they should."""

import math

import pytest
import torch
from torch import distributions as D

from tests.helpers.ensemble import member
from tests.helpers.problem import problem
from trimtab.adapters import NoiseSpec
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.rl.algorithms import DSRLSACConfig

BOUND, BATCH, FEATURES = 1.5, 6, 3


def make(**settings):
    torch.manual_seed(0)
    config = DSRLSACConfig(
        actor=ActorConfig(hidden=16, layers=2),
        critic=CriticConfig(members=3, hidden=16, layers=2),
        **settings,
    )
    space = FullNoiseConfig(bound=BOUND).build(NoiseSpec((2, 2)))
    algorithm = config.build(problem(FEATURES, space))
    torch.nn.init.normal_(algorithm.actor.net[-1].weight, std=0.5)  # so that states matter
    algorithm.fit_normalizer(torch.randn(100, FEATURES) * 2 + 1)
    with torch.no_grad():
        for parameter in algorithm.target_critic.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # a target that differs from its critic
    return algorithm


def make_batch(seed=1):
    torch.manual_seed(seed)
    return {
        "features": torch.randn(BATCH, FEATURES),
        "u": torch.rand(BATCH, 4) * 2 - 1,
        "reward": -torch.rand(BATCH) * 4,
        "discount": torch.tensor([0.96, 0.92, 0.0, 0.98, 0.0, 0.89]),  # terminal, short, whole chunks
        "next_features": torch.randn(BATCH, FEATURES),
    }


def reference_draw(algorithm, features, eps):
    """The actor's draw and its log density, by torch.distributions."""
    normal = algorithm.actor.normalizer
    x = ((features - normal.mean) / normal.std).clamp(-10, 10)
    mean, _ = algorithm.actor.net(x).chunk(2, -1)
    _, log_std = algorithm.actor(features)
    z = mean + log_std.exp() * eps
    u = BOUND * torch.tanh(z / BOUND)
    jacobian = torch.log(1 - torch.tanh(z / BOUND) ** 2 + 1e-12)
    return u, (D.Normal(mean, log_std.exp()).log_prob(z) - jacobian).sum(-1)


def reference_values(critic, features, u):
    x = torch.cat([((features - critic.normalizer.mean) / critic.normalizer.std).clamp(-10, 10), u], -1)
    return torch.stack([member(critic.net, e)(x).squeeze(-1) for e in range(3)])


@pytest.mark.parametrize("backup_entropy", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_td_target(backup_entropy, clip):
    algorithm = make(backup_entropy=backup_entropy, clip_targets=clip, initial_temperature=0.7)
    batch = make_batch()
    torch.manual_seed(5)
    target = algorithm.td_target(batch)
    torch.manual_seed(5)
    u, log_prob = reference_draw(algorithm, batch["next_features"], torch.randn(BATCH, 4))
    value = reference_values(algorithm.target_critic, batch["next_features"], u).min(0).values
    expected = torch.empty(BATCH)
    for i in range(BATCH):
        following = value[i] - (0.7 * log_prob[i] if backup_entropy else 0.0)
        expected[i] = batch["reward"][i] + batch["discount"][i] * following
        if clip and not backup_entropy:  # a soft value is no return
            expected[i] = max(-20.0, min(0.0, float(expected[i])))
    assert torch.allclose(target, expected, atol=1e-4)
    assert not target.requires_grad
    assert target[2] == pytest.approx(float(batch["reward"][2]), abs=1e-6)  # nothing follows a terminal chunk


def test_critic_loss():
    algorithm, batch = make(), make_batch()
    target = torch.randn(BATCH)
    loss, values = algorithm.critic_loss(batch, target)
    expected = reference_values(algorithm.critic, batch["features"], batch["u"])
    assert torch.allclose(values, expected, atol=1e-5)
    by_hand = sum(((expected[e] - target) ** 2).sum() / BATCH for e in range(3))
    assert torch.allclose(loss, by_hand, rtol=1e-5)


def test_logistic_critic_loss():
    algorithm, batch = make(critic_loss="logistic"), make_batch()
    low, high = algorithm.critic.bounds
    target = low + (high - low) * torch.rand(BATCH)
    p = reference_values(algorithm.critic, batch["features"], batch["u"]).sigmoid()
    wanted = (target - low) / (high - low)
    loss, values = algorithm.critic_loss(batch, target)
    assert torch.allclose(values, low + (high - low) * p, atol=1e-4)
    assert torch.allclose(loss, -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean(1).sum(), rtol=1e-4)


def test_actor_loss_and_where_its_gradient_goes():
    algorithm, batch = make(initial_temperature=0.3), make_batch()
    torch.manual_seed(7)
    loss, drawn = algorithm.actor_loss(batch)
    torch.manual_seed(7)
    u, log_prob = reference_draw(algorithm, batch["features"], torch.randn(BATCH, 4))
    value = reference_values(algorithm.critic, batch["features"], u).min(0).values
    assert torch.allclose(drawn.u, u, atol=1e-6)
    assert torch.allclose(loss, (0.3 * log_prob - value).mean(), atol=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in algorithm.actor.parameters())
    assert all(p.grad is None and p.requires_grad for p in algorithm.critic.parameters())
    assert algorithm.log_alpha.grad is None


def test_critic_gradient_stays_in_the_critic():
    algorithm, batch = make(), make_batch()
    loss, _ = algorithm.critic_loss(batch, algorithm.td_target(batch))
    loss.backward()
    assert all(p.grad is not None for p in algorithm.critic.parameters())
    assert all(p.grad is None for p in algorithm.target_critic.parameters())
    assert all(p.grad is None for p in algorithm.actor.parameters())


def test_temperature_loss_and_direction():
    algorithm = make(initial_temperature=0.5, target_entropy=-2.0)
    log_prob = torch.tensor([1.0, 3.0])
    loss = algorithm.temperature_loss(log_prob)
    assert float(loss) == pytest.approx(-0.5 * (2.0 - 2.0))
    for shift, sign in ((+5.0, -1.0), (-5.0, +1.0)):  # too little entropy: alpha must rise
        algorithm.log_alpha.grad = None
        algorithm.temperature_loss(log_prob + shift).backward()
        assert math.copysign(1.0, float(algorithm.log_alpha.grad)) == sign


def test_default_target_entropy_is_a_quarter_of_the_dimension():
    assert make().target_entropy == -1.0


def test_update_moves_each_part_by_its_rule():
    algorithm, batch = make(actor_every=2, tau=0.1), make_batch()
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    metrics = algorithm.update(batch)
    after = algorithm.state_dict()
    assert {"critic_loss", "q_mean", "q_min", "q_max", "entropy", "alpha", "noise_kl_to_prior"} <= set(
        metrics
    )
    assert not any(value.requires_grad for value in metrics.values())
    for name, value in before.items():
        if name.startswith("target_critic.net"):
            online = after[name.removeprefix("target_")]
            assert torch.allclose(after[name], value + 0.1 * (online - value), atol=1e-6)
        elif "normalizer" not in name:
            assert not torch.equal(after[name], value), name
    actor = algorithm.actor.net[0].weight.clone()
    assert "entropy" not in algorithm.update(batch)  # every second update leaves the actor alone
    assert torch.equal(actor, algorithm.actor.net[0].weight)


def test_reward_sign_matters():
    algorithm, batch = make(clip_targets=False), make_batch()
    torch.manual_seed(3)
    ahead = algorithm.td_target(batch)
    torch.manual_seed(3)
    flipped = algorithm.td_target(batch | {"reward": -batch["reward"]})
    assert torch.allclose(ahead - flipped, 2 * batch["reward"], atol=1e-4)
