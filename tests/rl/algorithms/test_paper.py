"""``--rl.preset=paper`` at its bound of 1.5: numbers by hand, and those of Stable-Baselines3's own SAC.

By hand: SAC's formulas (Haarnoja et al., arXiv 1812.05905) of an action in [-1, 1], of which the noise is 1.5
times as much, in torch's differentiable operations; weights and draws are those of the algorithm.
"""

import math

import draccus
import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm

from tests.helpers.point import PointAdapter
from tests.helpers.problem import problem
from trimtab.adapters import NoiseSpec
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpaceConfig
from trimtab.rl.algorithms import DSRLSACConfig
from trimtab.rl.algorithms.base import AlgorithmConfig
from trimtab.rl.algorithms.presets import PAPER
from trimtab.rl.data.decoder import ConditioningSpec, Decoder

DIM, FEATURES, BATCH, BOUND = 32, 2, 16, 1.5
ALPHA = 0.6


class WidePoint(PointAdapter):
    """The small policy of ``point.py`` with 32 numbers of noise."""

    def __init__(self):
        super().__init__()
        self.noise_spec, self.chunk_shape = NoiseSpec((DIM, 1)), (DIM, 1)


def paper(name):
    """Config of the algorithm and its noise space, as the preset has them."""
    rl = draccus.decode(AlgorithmConfig, {"type": name, **PAPER[name]["rl"]})
    return rl, draccus.decode(NoiseSpaceConfig, PAPER[name]["noise"])


@pytest.fixture(params=PAPER)
def learner(request):
    torch.manual_seed(0)
    config, noise = paper(request.param)
    adapter = WidePoint()
    space = noise.build(adapter.noise_spec)
    algorithm = config.build(problem(FEATURES, space, DIM))
    if request.param == "dsrl_na":
        spec = ConditioningSpec({"state": (FEATURES,)}, {"state": torch.float32})
        algorithm.decode = Decoder(adapter, space, spec)
    nn.init.normal_(algorithm.actor.net[-1].weight, std=0.03)  # so that states matter
    with torch.no_grad():
        algorithm.log_alpha.fill_(math.log(ALPHA))  # not where it starts, so that its place tells
        for name, parameter in algorithm.named_parameters():
            if name.startswith("target"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return algorithm


@pytest.fixture
def batch():
    torch.manual_seed(1)
    state, following, noise = (torch.randn(BATCH, n) for n in (FEATURES, FEATURES, DIM))
    noise = noise.clamp(-BOUND, BOUND)
    return {
        "features": state,
        "conditioning.state": state,
        "next_features": following,
        "next_conditioning.state": following,
        "u": noise / BOUND,  # Stable-Baselines3 keeps actions so, too
        "chunk": chunk_by_hand(state, noise),
        "reward": -torch.rand(BATCH) * 4,
        "discount": torch.tensor([0.99, 0.0]).repeat(BATCH // 2),
    }


def chunk_by_hand(state, noise):
    """What the point's policy makes of noise."""
    return torch.tanh(1.2 * noise * (1.0 + 0.3 * torch.sin(3.0 * state[:, :1])))


def draw_by_hand(actor, features, eps):
    """The action in [-1, 1] and log pi of it: a Gaussian, tanh, the change of variables."""
    out = features
    for layer in actor.net:
        out = layer(out)
    mean, log_std = out[:, :DIM], out[:, DIM:].clamp(-20.0, 2.0)
    z = mean + log_std.exp() * eps
    normal = -0.5 * ((z - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    slope = 1 - torch.tanh(z.double()) ** 2
    return torch.tanh(z), (normal - torch.log(slope)).sum(1).float()


def values_by_hand(critic, features, action):
    """(2, B): three hidden layers of LayerNorm and tanh, over state and action."""
    values = []
    for e in range(2):
        x = torch.cat([features, action], 1)
        for layer, (weight, bias) in enumerate(zip(critic.net.weights, critic.net.biases, strict=True)):
            x = x @ weight[e] + bias[e]
            if layer < 3:
                x = torch.tanh(layer_norm(x, x.shape[-1:]))
        values.append(x[:, 0])
    return torch.stack(values)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def gradients_agree(found, expected, parameters):
    parameters = list(parameters)
    for one, other in zip(
        torch.autograd.grad(found, parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert other.abs().max() > 0
        close(one, other)


def drawn_from(seed):
    torch.manual_seed(seed)
    return torch.randn(BATCH, DIM)


def exact(learner):
    return learner.config.type == "dsrl_na"


def test_one_number_by_hand():
    """mean 0.4, log_std -0.3, a draw of 0.7: z = 0.4 + 0.7 exp(-0.3) = 0.918573."""
    config, noise = paper("dsrl_sac")
    space = noise.build(NoiseSpec((1, 1)))
    actor = NoiseActor(1, space, config.actor)
    with torch.no_grad():
        actor.net[-1].bias.copy_(torch.tensor([0.4, -0.3]))
    drawn = actor.sample(torch.zeros(1, 1), torch.tensor([[0.7]]))
    assert drawn.u.item() == pytest.approx(0.725222, abs=1e-5)  # tanh(z)
    assert space.expand(drawn.u, torch.zeros(1, 1, 1)).item() == pytest.approx(1.087832, abs=1e-5)  # 1.5 u
    # -0.7^2 / 2 + 0.3 - log(2 pi) / 2 - log(1 - u^2)
    assert drawn.log_prob.item() == pytest.approx(-0.117504, abs=1e-5)


def test_one_number_at_the_defaults():
    """They count in deviations: u = 2 tanh(z / 2), and a tanh leads log_std, -0.3 before it, to -0.336785."""
    actor = NoiseActor(1, FullNoiseConfig().build(NoiseSpec((1, 1))), ActorConfig())
    with torch.no_grad():
        actor.net[-1].bias.copy_(torch.tensor([0.4, -0.3]))
    drawn = actor.sample(torch.zeros(1, 1), torch.tensor([[0.7]]))
    assert drawn.log_std.item() == pytest.approx(-0.336785, abs=1e-5)
    assert drawn.u.item() == pytest.approx(0.843670, abs=1e-5)
    assert actor.space.expand(drawn.u, torch.zeros(1, 1, 1)).item() == drawn.u.item()
    assert drawn.log_prob.item() == pytest.approx(-0.631206, abs=1e-5)


def test_log_pi_is_of_the_action_in_its_box(learner, batch):
    """Not of the noise: 32 ln 1.5 = 13 nats less."""
    eps = drawn_from(2)
    drawn = learner.actor.sample(batch["features"], eps)
    action, log_prob = draw_by_hand(learner.actor, batch["features"], eps)
    close(drawn.u, action)
    close(drawn.log_prob, log_prob)
    noise = learner.actor.space.expand(drawn.u, torch.zeros(BATCH, DIM, 1))
    close(noise.flatten(1), BOUND * action)
    assert noise.abs().max() > 1.2
    gradients_agree(drawn.log_prob.sum(), log_prob.sum(), learner.actor.net.parameters())
    # The same Gaussian with the noise itself as what is drawn.
    z = torch.distributions.Normal(BOUND * drawn.mean, BOUND * drawn.log_std.exp())
    tanh = torch.distributions.TanhTransform(cache_size=1)
    scale = torch.distributions.AffineTransform(0.0, 1 / BOUND)
    whole = [scale, tanh, torch.distributions.AffineTransform(0.0, BOUND, cache_size=1)]
    of_noise = torch.distributions.TransformedDistribution(z, whole).log_prob(BOUND * drawn.u).sum(1)
    torch.testing.assert_close(drawn.log_prob - of_noise, torch.full((BATCH,), 12.97488), rtol=0, atol=2e-3)


def test_target(learner, batch):
    """r + D (min of the two target critics at the next action - alpha log pi)."""
    torch.manual_seed(3)
    target = learner.td_target(batch)
    action, log_prob = draw_by_hand(learner.actor, batch["next_features"], drawn_from(3))
    judged = chunk_by_hand(batch["next_features"], BOUND * action) if exact(learner) else action
    value = values_by_hand(learner.target_critic, batch["next_features"], judged).min(0).values
    close(target, batch["reward"] + batch["discount"] * (value - ALPHA * log_prob))
    online = values_by_hand(learner.critic, batch["next_features"], judged).min(0).values
    assert (online - value).abs().max() > 1e-2  # or the two could be mistaken for each other


def test_critic(learner, batch):
    """Summed over the critics. Stable-Baselines3 takes half of it, which Adam does not see."""
    target = torch.randn(BATCH)
    loss, _ = learner.critic_loss(batch, target)
    judged = batch["chunk"] if exact(learner) else batch["u"]
    errors = values_by_hand(learner.critic, batch["features"], judged) - target
    close(loss, (errors**2).mean(1).sum())
    gradients_agree(loss, (errors**2).mean(1).sum(), learner.critic.net.parameters())


def test_actor_and_temperature(learner, batch):
    """alpha log pi - min of the critics of the noise, at the action; log pi + 0 is what moves alpha."""
    torch.manual_seed(4)
    loss, drawn = learner.actor_loss(batch)
    action, log_prob = draw_by_hand(learner.actor, batch["features"], drawn_from(4))
    critic = learner.noise_critic if exact(learner) else learner.critic
    value = values_by_hand(critic, batch["features"], action).min(0).values
    expected = (ALPHA * log_prob - value).mean()
    close(loss, expected)
    gradients_agree(loss, expected, learner.actor.net.parameters())
    # d/d log alpha; Stable-Baselines3's loss has log alpha for alpha, and so no factor alpha.
    (slope,) = torch.autograd.grad(learner.temperature_loss(drawn.log_prob), learner.log_alpha)
    assert float(slope) == pytest.approx(-ALPHA * (log_prob + 0.0).mean().item(), rel=1e-5)


@pytest.mark.parametrize("learner", ["dsrl_na"], indirect=True)
def test_distillation(learner, batch):
    """Q^W of the noise, scaled to the box, from Q^A of its chunk, head by head."""
    torch.manual_seed(5)
    u, chunks = learner.pairs(batch, 1)
    noise = BOUND * u[:, 0]
    torch.manual_seed(5)  # a draw of the prior, its tails pressed in
    close(noise, BOUND * torch.tanh(torch.randn(BATCH, 1, DIM)[:, 0] / BOUND))
    close(chunks[:, 0], chunk_by_hand(batch["features"], noise))
    loss = learner.distillation_loss(batch, u, chunks)
    wanted = values_by_hand(learner.critic, batch["features"], chunks[:, 0]).detach()
    errors = values_by_hand(learner.noise_critic, batch["features"], noise / BOUND) - wanted
    close(loss, (errors**2).mean(1).sum())
    gradients_agree(loss, (errors**2).mean(1).sum(), learner.noise_critic.net.parameters())


def test_log_std_is_clamped(learner):
    """To [-20, 2], and no gradient beyond."""
    actor = learner.actor
    wanted = torch.linspace(-40.0, 40.0, DIM)
    with torch.no_grad():
        actor.net[-1].weight.zero_()
        actor.net[-1].bias.copy_(torch.cat([torch.zeros(DIM), wanted]))
    drawn = actor.sample(torch.randn(3, FEATURES), torch.zeros(3, DIM))
    expected = torch.tensor([min(max(float(x), -20.0), 2.0) for x in wanted]).expand(3, DIM)
    assert torch.equal(drawn.log_std, expected) and torch.equal(actor(torch.zeros(3, 2))[1], expected)
    drawn.log_std.sum().backward()
    inside = ((wanted >= -20.0) & (wanted <= 2.0)).float()
    assert torch.equal(actor.net[-1].bias.grad, torch.cat([torch.zeros(DIM), 3.0 * inside]))


class Box(gym.Env):
    """Spaces only, for Stable-Baselines3."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (FEATURES,), np.float32)
    action_space = gym.spaces.Box(-BOUND, BOUND, (DIM,), np.float32)


def copy_linear(to, weight, bias):
    with torch.no_grad():
        to.weight.copy_(weight)
        to.bias.copy_(bias)


def test_an_update_is_that_of_stable_baselines3(batch, monkeypatch):
    """Its own ``SAC.train``, our weights and draws, the preset's settings less LayerNorm, which it lacks."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger

    torch.manual_seed(0)
    theirs = SAC(
        "MlpPolicy",
        Box(),
        learning_rate=3e-4,
        ent_coef="auto",
        target_entropy=0.0,
        policy_kwargs={"net_arch": [16, 16], "activation_fn": nn.Tanh},
        device="cpu",
    )
    theirs.set_logger(Logger(folder=None, output_formats=[]))
    size = {"hidden": 16, "layers": 2, "activation": "tanh", "layer_norm": False}
    _, noise = paper("dsrl_sac")
    settings = PAPER["dsrl_sac"]["rl"]
    settings = settings | {
        "actor": ActorConfig(**settings["actor"] | size),
        "critic": CriticConfig(**settings["critic"] | size),
    }
    space = noise.build(NoiseSpec((DIM, 1)))
    ours = DSRLSACConfig(**settings).build(problem(FEATURES, space, bounds=None))
    nn.init.normal_(ours.actor.net[-1].weight, std=0.1)
    with torch.no_grad():
        for parameter in ours.target_critic.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    linear = [layer for layer in ours.actor.net if isinstance(layer, nn.Linear)]
    for layer, to in zip(linear, [m for m in theirs.actor.latent_pi if isinstance(m, nn.Linear)]):
        copy_linear(to, layer.weight, layer.bias)
    copy_linear(theirs.actor.mu, linear[-1].weight[:DIM], linear[-1].bias[:DIM])
    copy_linear(theirs.actor.log_std, linear[-1].weight[DIM:], linear[-1].bias[DIM:])
    for critic, copies in ((ours.critic, theirs.critic), (ours.target_critic, theirs.critic_target)):
        for e, network in enumerate(copies.q_networks):
            own = zip(critic.net.weights, critic.net.biases, strict=True)
            for (weight, bias), to in zip(own, [m for m in network if isinstance(m, nn.Linear)]):
                copy_linear(to, weight[e].T, bias[e, 0])

    done = (batch["discount"] == 0).numpy()
    stored = theirs.policy.scale_action(BOUND * batch["u"].numpy())  # as its collector does
    for i in range(BATCH):
        row = (batch["features"][i], batch["next_features"][i], stored[i], batch["reward"][i], done[i])
        theirs.replay_buffer.add(*(np.asarray(value)[None] for value in row), [{}])
    np.random.seed(6)
    sampled = theirs.replay_buffer.sample(64)
    mine = {
        "features": sampled.observations,
        "next_features": sampled.next_observations,
        "u": sampled.actions,
        "reward": sampled.rewards[:, 0],
        "discount": 0.99 * (1 - sampled.dones[:, 0]),
    }
    torch.manual_seed(7)
    draws = [torch.randn(64, DIM), torch.randn(64, DIM)]  # it draws for the state first, we for the next
    monkeypatch.setattr(ours.actor, "sample", lambda x: NoiseActor.sample(ours.actor, x, draws.pop()))
    metrics = ours.update(mine)
    np.random.seed(6)
    torch.manual_seed(7)
    theirs.train(gradient_steps=1, batch_size=64)

    assert float(metrics["critic_loss"]) == pytest.approx(
        2 * theirs.logger.name_to_value["train/critic_loss"], rel=1e-5
    )
    assert float(metrics["actor_loss"]) == pytest.approx(
        theirs.logger.name_to_value["train/actor_loss"], rel=1e-5
    )

    def slopes(optimizer):
        """Adam's mean of the gradients, after one a tenth of it, by parameter."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        return [optimizer.state[p]["exp_avg"] for group in optimizer.param_groups for p in group["params"]]

    found, expected = slopes(ours.alpha_optimizer), slopes(theirs.ent_coef_optimizer)
    close(found[0], expected[0][0])
    found, expected = slopes(ours.actor_optimizer), slopes(theirs.actor.optimizer)
    assert len(expected) == 8  # the head is in two there
    expected = [*expected[:4], torch.cat(expected[4::2]), torch.cat(expected[5::2])]
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    found, expected = slopes(ours.critic_optimizer), slopes(theirs.critic.optimizer)
    for layer in range(3):
        for e in range(2):
            close(found[layer][e].T, 2 * expected[6 * e + 2 * layer])
            close(found[3 + layer][e, 0], 2 * expected[6 * e + 2 * layer + 1])
    for e, network in enumerate(theirs.critic_target.q_networks):
        close(ours.target_critic.net.weights[1][e].T, network[2].weight)


def test_a_larger_box_is_scaled_alike():
    """What Stable-Baselines3 makes of an action for the environment, and of that for its replay."""
    from stable_baselines3 import SAC

    policy = SAC("MlpPolicy", Box(), device="cpu").policy
    space = FullNoiseConfig(bound=BOUND, unit="bound").build(NoiseSpec((DIM, 1)))
    u = torch.rand(5, DIM) * 2 - 1
    noise = space.expand(u, torch.zeros(5, DIM, 1)).flatten(1)
    assert np.allclose(noise, policy.unscale_action(u.numpy()), atol=1e-6)
    assert np.allclose(
        space.project(noise.unflatten(1, (DIM, 1))), policy.scale_action(noise.numpy()), atol=1e-6
    )


def test_log_prob_of_stable_baselines3(learner, batch):
    from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution

    eps = drawn_from(8)
    drawn = learner.actor.sample(batch["features"], eps)
    theirs = SquashedDiagGaussianDistribution(DIM).proba_distribution(drawn.mean, drawn.log_std)
    z = drawn.mean + drawn.log_std.exp() * eps
    # It adds 1e-6 within the logarithm of the slope.
    torch.testing.assert_close(drawn.log_prob, theirs.log_prob(torch.tanh(z), z), rtol=1e-4, atol=2e-3)
