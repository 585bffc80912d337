"""Best-of-N: each loss against a hand-written reference, and a small problem that it must solve."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.helpers.batches import transitions
from tests.helpers.point import PointAdapter, PointConfig
from tests.helpers.problem import problem
from trimtab.adapters import Conditioning, NoiseSpec, UserError
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_samplers import base_noise, steered_noise
from trimtab.policies.noise_space import FullNoiseConfig, MaskedNoiseConfig, ResidualNoiseConfig
from trimtab.rl.algorithms import BestOfNConfig
from trimtab.rl.algorithms.dsrl_na import rank_correlation
from trimtab.rl.budget import TrainConfig
from trimtab.rl.collector import Collector
from trimtab.rl.data.memory import replay_layout
from trimtab.rl.data.replay import ReplayBuffer
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import evaluate
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.takeover import TakeoverConfig
from trimtab.rl.trainer import Trainer

B, K, A, D = 6, 5, 4, 3
SMALL = {"actor": ActorConfig(hidden=32, layers=2), "critic": CriticConfig(hidden=32, layers=2, members=3)}


def build(**settings):
    torch.manual_seed(0)
    config = BestOfNConfig(num_candidates=K, target_candidates=3, **SMALL, **settings)
    space = FullNoiseConfig().build(NoiseSpec((2, 1)))
    return config.build(problem(D, space, A))


def set_apart(algorithm):
    """``algorithm`` with target networks that are no copies of the online ones, as after some updates."""
    generator = torch.Generator().manual_seed(4)
    for value in algorithm.target_critic.parameters():
        value.data += 0.3 * torch.randn(value.shape, generator=generator)
    return algorithm


def batch():
    return transitions(D, A, K)


INDEX = torch.tensor([[0, 2, 4]] * B)


def expected_target(algorithm, data, kind, members):
    """By hand, with the smallest value among ``members``."""
    found = []
    for row in range(B):
        values = []
        for k in INDEX[row]:
            chunk = data["next_candidates"][row, k][None]
            judged = algorithm.target_critic(data["next_features"][row][None], chunk)
            values.append(judged[members].min().item())
        if kind == "max":
            value = max(values)
        elif kind == "sarsa":
            value = values[0]
        else:
            weights = np.exp(np.array(values) / 0.3)
            value = float((weights / weights.sum() * values).sum())
        expected = float(data["reward"][row]) + float(data["discount"][row]) * value
        found.append(max(-20.0, min(0.0, expected)))
    return torch.tensor(found)


@pytest.mark.parametrize("kind", ["max", "sarsa", "softmax"])
def test_td_target(kind):
    algorithm, data = set_apart(build(target=kind, target_members=3)), batch()
    expected = expected_target(algorithm, data, kind, [0, 1, 2])
    assert torch.allclose(algorithm.td_target(data, INDEX), expected, atol=1e-5)


def test_td_target_takes_the_smaller_of_two_members_drawn_anew():
    algorithm, data = set_apart(build(target_members=2)), batch()
    pairs = [expected_target(algorithm, data, "max", list(pair)) for pair in ((0, 1), (0, 2), (1, 2))]
    seen = []
    for _ in range(60):
        found = algorithm.td_target(data, INDEX)
        seen.append([torch.allclose(found, expected, atol=1e-5) for expected in pairs])
    assert all(sum(row) == 1 for row in seen)  # one pair for the whole batch
    assert all(10 <= sum(column) <= 30 for column in zip(*seen))


def test_target_from_stored_candidates_equals_fresh_ones():
    """The learner needs no call to the policy: what the replay kept gives the target of decoding anew."""
    adapter, config = PointAdapter(), PointConfig()
    rl = BestOfNConfig(num_candidates=K, target_members=3, clip_targets=False, **SMALL)
    space = FullNoiseConfig(bound=50.0).build(adapter.noise_spec)  # clips no draw
    with ChunkVectorEnv(config, 2, 0) as vec:
        short = replace(rl, gamma=0.9, n_step=1)
        collector = Collector(PolicyRunner(adapter, config), vec, short, "sparse", 7)
        collector.start(short.build(problem(2, space, 2, None)))
        transitions = []
        for _ in range(10):
            collector.begin(steering=False)
            transitions += collector.finish()[0]
    replay = ReplayBuffer(50, replay_layout(rl, adapter, space, 2), 0)
    for transition in transitions:
        replay.add(transition)
    stored = {name: value.float() for name, value in replay.rows(0, len(replay)).items()}
    u = torch.stack([torch.as_tensor(t.extra["next_candidates_u"]) for t in transitions])
    states = Conditioning({"state": torch.as_tensor(np.stack([t.next_features for t in transitions]))})
    noise = u.flatten(0, 1).unflatten(1, adapter.noise_spec.shape)
    decoded = adapter.denoise(states.repeat_interleave(K), noise).flatten(1).unflatten(0, (-1, K))
    algorithm = set_apart(rl.build(problem(2, space, 2, None)))
    everything = torch.arange(K).expand(len(transitions), K)
    target = algorithm.td_target(stored, everything)
    fresh = algorithm.td_target({**stored, "next_candidates": decoded}, everything)
    assert len(transitions) == 20 and (target - fresh).abs().max() < 2e-3  # the replay keeps them in float16
    others = algorithm.td_target({**stored, "next_candidates": decoded.roll(1, 0)}, everything)
    assert (target - others).abs().max() > 0.05  # those of another state would be seen


def errors(kind, value, target):
    """One term of a critic's loss, by hand; returns lie in [-20, 0]."""
    if kind == "squared":
        return (value - target) ** 2
    p, wanted = (value + 20) / 20, (target + 20) / 20
    return -(wanted * np.log(p) + (1 - wanted) * np.log(1 - p))


@pytest.mark.parametrize("kind", ["logistic", "squared"])
def test_critic_loss(kind):
    algorithm, data = build(critic_loss=kind), batch()
    target = torch.linspace(-3, 0, B)
    loss, values = algorithm.critic_loss(data, target)
    expected = 0.0
    for member in range(3):
        for row in range(B):
            value = algorithm.critic(data["features"][row][None], data["chunk"][row][None])[member, 0].item()
            assert values[member, row].item() == pytest.approx(value, rel=1e-5)
            expected += errors(kind, value, target[row].item()) / B
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert values.shape == (3, B) and not values.requires_grad


@pytest.mark.parametrize("pairs", [[1, 3], [2]])
@pytest.mark.parametrize("kind", ["logistic", "squared"])
def test_distillation_reaches_the_noise_critic_alone(kind, pairs):
    algorithm, data = build(critic_loss=kind), batch()
    loss = algorithm.distillation_loss(data, torch.tensor([pairs] * B))
    expected = 0.0
    for row in range(B):
        for k in pairs:
            features = data["features"][row][None]
            wanted = algorithm.critic(features, data["candidates"][row, k][None]).mean().item()
            values = algorithm.noise_critic(features, data["candidates_u"][row, k][None])
            expected += sum(errors(kind, value.item(), wanted) for value in values[:, 0]) / (len(pairs) * B)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(parameter.grad is None for parameter in algorithm.critic.parameters())
    assert all(parameter.grad is not None for parameter in algorithm.noise_critic.parameters())


def test_the_noise_critic_has_its_own_size_and_learns_in_half_of_the_states():
    def learnt(rows):
        """What the first update makes of it, with other noises in ``rows``."""
        algorithm, data = build(noise_members=4), batch()
        assert algorithm.noise_critic.members == 4 and algorithm.critic.members == 3
        data["candidates_u"][rows] *= -0.5
        torch.manual_seed(1)
        algorithm.update(data)
        return torch.nn.utils.parameters_to_vector(algorithm.noise_critic.parameters())

    plain = learnt([])
    assert torch.equal(plain, learnt([1, 3, 5])) and not torch.equal(plain, learnt([4]))


def test_logistic_critics_stay_within_the_possible_returns():
    algorithm, data = build(), batch()
    for critic in (algorithm.critic, algorithm.target_critic, algorithm.noise_critic):
        critic.net.biases[-1].data.fill_(50.0)
    far = algorithm.td_target(data | {"reward": torch.full((B,), 3.0)}, INDEX)
    assert far.max() == 0.0 and algorithm.critic(data["features"], data["chunk"]).max() <= 0.0
    loss, _ = algorithm.critic_loss(data, torch.full((B,), -20.0))
    loss.backward()  # as strong as ever where a squared error behind a sigmoid would have no slope left
    slope = algorithm.critic.net.biases[-1].grad
    assert torch.allclose(slope, torch.ones_like(slope))


def test_without_bounds_the_error_is_squared():
    """The environment's own reward tells no bounds of its returns."""
    config = BestOfNConfig(num_candidates=K, target_candidates=3, **SMALL)
    free = config.build(problem(D, FullNoiseConfig().build(NoiseSpec((2, 1))), A, None))
    data, target = batch(), torch.linspace(-30, 30, B)
    loss, values = free.critic_loss(data, target)
    assert loss.item() == pytest.approx((values - target).square().mean(1).sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("share", "at_mean"),
    [(0.0, []), (0.5, [1, 3, 5]), (0.4, [2, 4]), (1.0, [0, 1, 2, 3, 4, 5])],
)
def test_actor_loss(share, at_mean):
    """The actor climbs at a draw, and in a share of the rows, spread over the batch, at its mean."""
    algorithm, data = build(prior_weight=0.7, mean_share=share), batch()
    torch.nn.init.normal_(algorithm.actor.net[-1].weight)
    torch.manual_seed(5)
    loss, divergence, u = algorithm.actor_loss(data)
    torch.manual_seed(5)
    drawn = algorithm.actor.sample(data["features"])
    normal = torch.distributions.Normal(drawn.mean, drawn.log_std.exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    assert torch.allclose(divergence, expected, atol=1e-5)
    noise = torch.stack(
        [2.0 * torch.tanh(drawn.mean[row] / 2.0) if row in at_mean else drawn.u[row] for row in range(B)]
    )
    assert torch.allclose(u, noise, atol=1e-6)
    value = algorithm.noise_critic(data["features"], noise).mean(0)
    assert loss.item() == pytest.approx((0.7 * expected - value).mean().item(), rel=1e-5)
    assert u.abs().max() <= 2.0
    loss.backward()
    assert all(parameter.grad is None for parameter in algorithm.noise_critic.parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in algorithm.actor.parameters())


def test_regression_loss():
    algorithm, data = build(distillation="regression", regression_temperature=0.4), batch()
    torch.nn.init.normal_(algorithm.actor.net[-1].weight)
    loss, _, u = algorithm.regression_loss(data)
    mean, log_std = algorithm.actor(data["features"])
    normal, expected = torch.distributions.Normal(mean.detach(), log_std.exp().detach()), 0.0
    for row in range(B):
        values = torch.stack(
            [
                algorithm.critic(data["features"][row][None], data["candidates"][row, k][None]).mean()
                for k in range(K)
            ]
        )
        weights = torch.softmax(values.detach() / 0.4, 0)
        for k in range(K):
            z = 2.0 * torch.atanh((data["candidates_u"][row, k] / 2.0).clamp(-0.999, 0.999))
            log_prob = torch.distributions.Normal(normal.loc[row], normal.scale[row]).log_prob(z).sum()
            expected -= float(weights[k] * (log_prob + np.log(2 * np.pi))) / B  # two dimensions
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert all(parameter.grad is None for parameter in algorithm.critic.parameters())
    assert u.shape == (B, 2) and u.abs().max() <= 2.0


def test_selection():
    data = batch()
    algorithm = build(acting="argmax")
    chosen = algorithm.select(data["features"], data["candidates"].unsqueeze(2))
    for row in range(B):
        values = [
            algorithm.critic(data["features"][row][None], data["candidates"][row, k][None]).mean().item()
            for k in range(K)
        ]
        assert int(chosen[row]) == int(np.argmax(values))
    for acting in ("softmax", "thompson"):
        algorithm = build(acting=acting)
        picks = torch.stack(
            [algorithm.select(data["features"], data["candidates"].unsqueeze(2)) for _ in range(50)]
        )
        assert picks.min() >= 0 and picks.max() < K and len(picks.unique()) > 1


def test_rank_correlation_is_spearmans_within_states():
    from scipy.stats import spearmanr

    algorithm, data = build(), batch()
    found = []
    for row in range(B):
        features = data["features"][row].expand(K, -1)
        noise = algorithm.noise_critic(features, data["candidates_u"][row]).mean(0).detach()
        action = algorithm.critic(features, data["candidates"][row]).mean(0).detach()
        found.append(spearmanr(noise, action).statistic)
    pairs = data["candidates_u"], data["candidates"]
    ranks = rank_correlation(algorithm.noise_critic, algorithm.critic, data["features"], *pairs)
    assert ranks.item() == pytest.approx(np.mean(found), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"target": "min"}, "--rl.target"),
        ({"acting": "best"}, "--rl.acting"),
        ({"target_candidates": 99}, "--rl.target_candidates"),
        ({"actor_candidates": 16}, "--rl.actor_candidates"),
        ({"prior_weight": 0.0}, "--rl.prior_weight"),
        ({"mean_share": 1.5}, "--rl.mean_share"),
        ({"distillation": "none"}, "--rl.distillation"),
    ],
)
def test_bad_settings(settings, option):
    with pytest.raises(UserError, match=option):
        BestOfNConfig(**settings)


@pytest.mark.parametrize("space", [MaskedNoiseConfig(rows="0:1"), ResidualNoiseConfig()])
def test_spaces_whose_u_does_not_tell_the_noise_are_refused(space):
    built = space.build(NoiseSpec((2, 1)))
    with pytest.raises(UserError, match=r"--noise\.type: best_of_n distils"):
        BestOfNConfig().build(problem(D, built, A, None))


def test_collector_keeps_what_was_decoded():
    """The stored chunk is what the policy makes of the stored noise, and the next state's are the next's."""
    adapter, config = PointAdapter(), PointConfig()
    space = FullNoiseConfig(bound=50.0).build(adapter.noise_spec)  # a bound so wide that nothing is clipped
    with ChunkVectorEnv(config, 3, 0) as vec:
        rl = BestOfNConfig(gamma=0.95, n_step=1, num_candidates=4, actor_candidates=0)
        collector = Collector(PolicyRunner(adapter, config), vec, rl, "sparse", 7)
        algorithm = rl.build(problem(2, space, 2, None))
        algorithm.select = lambda features, chunks: torch.tensor([3, 1, 2])
        collector.start(algorithm)
        rounds = []
        for _ in range(6):
            collector.begin()
            transitions, episodes = collector.finish()
            rounds.append((transitions, {episode.seed for episode in episodes}))
    for transitions, _ in rounds:
        for transition, index in zip(transitions, (3, 1, 2), strict=True):
            kept = transition.extra
            assert np.array_equal(kept["chunk"], kept["candidates"][index])
            assert np.array_equal(transition.u, kept["candidates_u"][index])
            conditioning = adapter.example_conditioning(1, torch.Generator()).repeat_interleave(4)
            conditioning.tensors["state"][:] = torch.as_tensor(transition.features)
            noise = torch.as_tensor(kept["candidates_u"]).unflatten(1, adapter.noise_spec.shape)
            made = adapter.denoise(conditioning, noise).flatten(1)
            assert np.allclose(made, kept["candidates"], atol=1e-5)
    (first, ended), (second, _) = rounds[0], rounds[1]
    if not ended:
        for before, after in zip(first, second, strict=True):
            assert np.array_equal(before.extra["next_candidates"], after.extra["candidates"])


def test_the_actor_proposes_some_of_the_candidates():
    """The last ones, by its own view of each observation; the first are the draws they were without it."""
    adapter, config = PointAdapter(), PointConfig()
    space = FullNoiseConfig(bound=2.0).build(adapter.noise_spec)
    found = {}
    for proposes in (False, True):
        with ChunkVectorEnv(config, 3, 0) as vec:
            rl = BestOfNConfig(gamma=0.95, n_step=1, num_candidates=5, actor_candidates=2)
            runner = PolicyRunner(adapter, config)
            collector = Collector(runner, vec, rl, "sparse", 7, assign=lambda: False)
            algorithm = rl.build(problem(2, space, 2, None))
            algorithm.actor.choose = lambda features, prior: choose(features)
            collector.start(algorithm)
            rounds = []
            for _ in range(20):
                collector.begin(steering=proposes)  # no episode is steered: a draw of the prior acts
                rounds += collector.finish()[0]
            found[proposes] = rounds
    later = 0
    for plain, own in zip(found[False], found[True], strict=True):
        assert np.array_equal(plain.features, own.features) and np.array_equal(plain.u, own.u)
        assert np.array_equal(plain.extra["next_candidates"][:3], own.extra["next_candidates"][:3])
        wanted = choose(torch.as_tensor(own.features)[None])[0].numpy()
        chosen = [np.allclose(row, wanted, atol=1e-5) for row in own.extra["candidates_u"]]
        later += chosen == [False, False, False, True, True]
    assert later == 3 * 19  # all but those of the first observation, which came before it proposed


def choose(features):
    """A noise that depends on the state: (B, d) -> (B, 2)."""
    angle = 3.0 * features.sum(-1, keepdim=True)
    return 1.5 * torch.cat([torch.sin(angle), torch.cos(angle)], -1)


def train(seed, gate, steps):
    adapter, config, lines = PointAdapter(), PointConfig(limit=35), []
    runner = PolicyRunner(adapter, config)
    rl = BestOfNConfig(
        batch_size=64,
        gamma=0.95,
        actor=ActorConfig(hidden=64, layers=2),
        critic=CriticConfig(hidden=64, layers=2),
    )
    budget = TrainConfig(
        env_steps=steps,
        warmup_transitions=0 if gate else 300,
        first_update=100,
        gate=TakeoverConfig(enabled=gate),
    )
    with ChunkVectorEnv(config, 8, 0) as vec:
        trainer = Trainer(
            runner, vec, Accelerator(cpu=True), budget, rl, FullNoiseConfig(), seed, lines.append, False
        )
        calls, denoise = [], adapter.denoise
        adapter.denoise = lambda *arguments: (calls.append(trainer.updates), denoise(*arguments))[1]
        update = trainer.algorithm.update

        def counted(data):
            before = len(calls)
            metrics = update(data)
            assert len(calls) == before  # the learner never calls the base
            return metrics

        trainer.algorithm.update = counted
        algorithm = trainer.run()
        adapter.denoise = denoise
        seeds = range(1000, 1100)
        base = evaluate(runner, vec, base_noise, seeds, progress=False)
        steered = evaluate(runner, vec, steered_noise(algorithm.actor, True), seeds, progress=False)
    return base, steered, lines, trainer


def test_solves_a_noise_space_problem():
    base, steered, lines, trainer = train(seed=0, gate=False, steps=1700)
    rates = [group["lr"] for group in trainer.algorithm.critic_optimizer.param_groups]
    assert rates == [pytest.approx(1e-4, rel=0.2)]  # they have fallen, but for the last chunk's steps
    algorithm, features = trainer.algorithm, trainer.collector.rollout.features
    draws, count = torch.randn(8, algorithm.config.candidates, 2, 1), algorithm.config.proposed
    proposed = algorithm.propose(features, draws, lambda noise: noise, steering=True).u[:, -count:]
    mean = algorithm.actor.choose(features, draws[:, 0], deterministic=True)
    assert torch.allclose(proposed[:, 0], mean, atol=1e-6)  # what is deployed is judged while learning
    assert not torch.allclose(proposed[:, 1], mean, atol=1e-2)
    assert 0.2 < base.success_rate < 0.5
    assert steered.success_rate > 0.95  # the distilled actor, one noise per chunk
    assert lines[-1]["rank_correlation"] > 0.8


def test_what_is_deployed_takes_the_best_of_so_many_by_the_critic():
    algorithm = build(deployed_candidates=3)
    policy = algorithm.deployed_policy()
    features, prior = torch.randn(B, D), torch.randn(B, 3, 2, 1)

    def denoise(noise):
        return torch.cat([noise, noise.square()], 3).flatten(2).unsqueeze(-1)

    choice = policy.act(features, prior, denoise)
    offered = torch.cat(
        [prior[:, :2].flatten(2), algorithm.actor.choose(features, prior[:, 2], True).unsqueeze(1)], 1
    )
    offered[:, :2] = algorithm.space.squash(algorithm.space.initial_std * prior[:, :2].flatten(2))
    chunks = denoise(algorithm.space.expand(offered.flatten(0, 1), prior.flatten(0, 1)).unflatten(0, (B, 3)))
    best = algorithm.critic(features, chunks.flatten(2)).mean(0).argmax(1)
    assert policy.draws == 3 and len(best.unique()) > 1
    assert torch.allclose(choice.u, offered[torch.arange(B), best], atol=1e-6)
    assert build().deployed_policy().draws == 4 and build(deployed_candidates=1).deployed_policy().draws == 1
    trained = algorithm.trained_parameters()
    assert trained["actor"] == trained["acting"] > build(deployed_candidates=1).trained_parameters()["actor"]


def test_gate_lets_the_learner_in():
    _, steered, lines, trainer = train(seed=1, gate=True, steps=1200)
    assert steered.success_rate > 0.95
    assert lines[0]["gate_share"] < 1.0 and lines[-1]["gate_share"] > 0.9
    assert lines[-1]["success_rate"] > 0.9
    assert trainer.takeover._base and trainer.takeover._steered
