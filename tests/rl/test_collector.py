"""The collector: true last observations, no transition across episodes, exact book-keeping."""

import itertools

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.helpers.acting import Acts
from tests.helpers.faulty import FaultyConfig
from tests.helpers.point import PointAdapter, PointConfig
from tests.helpers.problem import problem
from trimtab.adapters import PolicyConfig, load_adapter
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.rl.algorithms import DSRLSACConfig, ResidualConfig
from trimtab.rl.collector import Collector
from trimtab.rl.envs.metaworld import MetaworldStateConfig, MetaworldStateEnv
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.metrics import WINDOW, RunMetrics, calibration, returns_to_go
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.processes import ProcessGroup


def collect(adapter, config, steps, n_step=1, envs=3, gamma=0.9, workers=0, tolerant=False, **settings):
    runner = PolicyRunner(adapter, config)
    with ChunkVectorEnv(config, envs, workers, adapter.n_obs_steps, tolerant=tolerant) as vec:
        space = FullNoiseConfig(bound=50.0).build(adapter.noise_spec)
        rl = DSRLSACConfig(gamma=gamma, n_step=n_step, **settings)
        collector = Collector(runner, vec, rl, "sparse", seed=5)
        collector.start(Acts(space))
        transitions, episodes = [], []
        for _ in range(steps):
            collector.begin()
            more, ended = collector.finish()
            transitions += more
            episodes += ended
    return transitions, episodes, collector


def test_every_transition_replays_in_the_simulator(tiny_base):
    """Re-run each episode alone from its seed and stored noise; compare what was recorded."""
    adapter = load_adapter(PolicyConfig(path=str(tiny_base), device="cpu"))
    config = MetaworldStateConfig(task="button-press-topdown-v3", episode_length=10)
    transitions, episodes, collector = collect(adapter, config, 9, envs=2)
    assert len(episodes) == 6 and all(not episode.terminated for episode in episodes)
    assert collector.env_steps == 60
    assert [episode.seed for episode in episodes] == [5, 6, 7, 8, 9, 10]
    runner = PolicyRunner(adapter, config)
    by_start = {t.features.tobytes(): t for t in transitions}
    for episode in episodes:
        env = MetaworldStateEnv(config.task, episode_length=10)
        observation, _ = env.reset(seed=episode.seed)
        for chunk, length in enumerate((4, 4, 2)):
            history = {key: value[None] for key, value in observation.items()}
            conditioning = runner.encode([history], [env.task_description])
            features = runner.features(conditioning)[0].numpy()
            assert np.allclose(features, episode.features[chunk], atol=1e-6)
            actions = runner.decode(conditioning, torch.as_tensor(episode.u[chunk]).reshape(1, 8, 4))[0]
            for action in actions[:length]:
                observation, _, _, truncated, _ = env.step(action)
            transition = by_start[episode.features[chunk].tobytes()]
            history = {key: value[None] for key, value in observation.items()}
            after = runner.features(runner.encode([history], [env.task_description]))[0].numpy()
            assert np.allclose(transition.next_features, after, atol=1e-5)
            assert transition.reward == pytest.approx(-sum(0.9**i for i in range(length)))
            assert transition.discount == pytest.approx(0.9**length)
        assert truncated


def test_what_a_robot_executes_does_not_overwrite_what_the_base_proposed():
    """The residual policy's unsteered chunk is the base's own, of which the replay keeps a copy."""
    config, adapter = PointConfig(), PointAdapter()
    with ChunkVectorEnv(config, 2, 0) as vec:
        rl = ResidualConfig()
        collector = Collector(PolicyRunner(adapter, config), vec, rl, "sparse", seed=5)
        space = FullNoiseConfig().build(adapter.noise_spec)
        collector.start(rl.build(problem(collector.rollout.features.shape[1], space, 2)))
        noted = []
        vec.note = lambda **arrays: noted.append(bool(arrays["steered"]))
        collector.begin(steering=False)
        assert noted == [False] and collector._episodes[0].steered, "the untrained actor acts"
        before = collector._candidates.chunks.clone()
        assert np.array_equal(collector._chunks, before[:, 0].flatten(1))
        collector._chunks[:], collector._u[:] = 7.0, 7.0
        assert torch.equal(collector._candidates.chunks, before)
        assert not (collector._candidates.u == 7.0).any()
        collector.finish()


def test_no_transition_crosses_an_episode_and_terminal_ones_hand_nothing_on():
    transitions, episodes, _ = collect(PointAdapter(), PointConfig(), 80, n_step=3, envs=4)
    assert any(episode.terminated for episode in episodes) and any(not e.terminated for e in episodes)
    goals = {round(float(episode.features[0, 1]), 6) for episode in episodes}
    assert len(goals) == len(episodes)
    for transition in transitions:  # an episode has one goal, and it is part of the features
        assert transition.features[1] == transition.next_features[1]
    arrived = [t for t in transitions if abs(t.next_features[0] - t.next_features[1]) < 0.1]
    assert arrived and all(t.discount == 0.0 for t in arrived)
    rest = [t for t in transitions if abs(t.next_features[0] - t.next_features[1]) >= 0.1]
    assert rest and all(t.discount > 0.0 for t in rest)


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"discount_per": "chunk", "bootstrap_at_time_limit": False}])
def test_an_episode_that_fails_returns_the_lowest_there_is(n_step, settings):
    config = PointConfig(brink=0.3)
    transitions, episodes, collector = collect(PointAdapter(), config, 60, n_step, 4, **settings)
    low = collector.returns.bounds[0]
    assert low == pytest.approx(-20.0 if settings else -10.0)
    fallen = [t for t in transitions if t.next_features[0] * np.sign(t.next_features[1]) < -0.3]
    assert len(fallen) > 10 and all((t.reward, t.discount) == (pytest.approx(low), 0.0) for t in fallen)
    failed = [e for e in episodes if e.terminated and not e.success]
    assert len(failed) > 10 and any(e.success for e in episodes) and not all(e.terminated for e in episodes)
    for episode in episodes:
        worth = returns_to_go(episode, tail=0.0)
        assert worth == pytest.approx(low) if episode in failed else worth.min() > low


def test_an_end_after_a_success_is_no_failure():
    """LeRobot's count: an episode that has ever succeeded is a success."""
    config = PointConfig(brink=0.1, goes_on=True, limit=90)
    _, episodes, _ = collect(PointAdapter(), config, 200, envs=4)
    ends = [(e, e.rewards[-1], e.discounts[-1]) for e in episodes if e.terminated]
    won = [(reward, discount) for episode, reward, discount in ends if episode.success]
    lost = [(reward, discount) for episode, reward, discount in ends if not episode.success]
    assert won and set(won) <= {(-1.0, 0.0), (-1.9, 0.0)}  # it fell in the chunk's first or second step
    assert lost and all(end == (pytest.approx(-10.0), 0.0) for end in lost)


@pytest.mark.parametrize("bootstrap", [True, False])
def test_what_follows_a_time_limit_has_a_value_or_none(bootstrap):
    transitions, episodes, _ = collect(
        PointAdapter(), PointConfig(), 20, envs=2, bootstrap_at_time_limit=bootstrap
    )
    cut = {e.features[-1].tobytes() for e in episodes if not e.terminated}
    last = [t for t in transitions if t.features.tobytes() in cut]
    assert len(last) == len(cut) > 2
    assert all((t.discount > 0.0) == bootstrap for t in last)
    assert all(t.discount > 0.0 for t in transitions[:4])  # in the middle of an episode


def test_what_a_lost_episode_had_begun_to_tell_is_gone():
    """Three chunks make a transition, and the fault is in the third: none holds what came before it."""
    adapter, config = PointAdapter(), FaultyConfig(fault="raise")
    transitions, _, collector = collect(adapter, config, 40, n_step=3, tolerant=True)
    assert [kind for kind, _ in collector.lost].count("crash") > 2
    assert transitions and all(t.features[1] == t.next_features[1] for t in transitions)  # one goal each


def test_the_untrained_actor_acts_where_an_episode_is_not_steered():
    """In every such episode by what is seen there, not in another environment."""
    adapter, config = PointAdapter(), PointConfig()
    space = FullNoiseConfig(bound=50.0).build(adapter.noise_spec)
    with ChunkVectorEnv(config, 3, 0) as vec:
        rl = DSRLSACConfig(gamma=0.9, n_step=1)
        collector = Collector(PolicyRunner(adapter, config), vec, rl, "sparse", seed=5)
        collector.start(
            Acts(
                space,
                lambda features, prior: 10.0 + features[:, 1:].expand(-1, 2),
                lambda features, prior: features[:, 1:].expand(-1, 2),
            )
        )
        collector.assign = itertools.cycle([False, True, True, False]).__next__
        episodes = []
        for _ in range(40):
            collector.begin()
            episodes += collector.finish()[1]
    assert {episode.steered for episode in episodes} == {True, False}
    for episode in episodes:
        expected = episode.features[:, 1:] + 10.0 * episode.steered  # the goal
        assert np.allclose(episode.u, expected, atol=1e-3)


def test_transitions_do_not_depend_on_workers(tiny_base):
    adapter = load_adapter(PolicyConfig(path=str(tiny_base), device="cpu"))
    config = MetaworldStateConfig(task="button-press-topdown-v3", episode_length=10)
    here, _, _ = collect(adapter, config, 4, n_step=2, envs=3, workers=0)
    there, _, _ = collect(adapter, config, 4, n_step=2, envs=3, workers=2)
    assert len(here) == len(there) > 0
    for first, second in zip(here, there, strict=True):
        for name in ("features", "u", "reward", "discount", "next_features"):
            assert np.array_equal(getattr(first, name), getattr(second, name))


def test_history_of_two_observations_reaches_the_policy(pusht_policy):
    from lerobot.envs.configs import PushtEnv

    adapter = load_adapter(PolicyConfig(path=str(pusht_policy), device="cpu"))
    config = PushtEnv(obs_type="environment_state_agent_pos", episode_length=8)
    transitions, episodes, _ = collect(adapter, config, 6, envs=2)
    assert transitions[0].features.shape == (2 * (2 + 16),)
    first = episodes[0].features[0]
    assert np.array_equal(first[:18], first[18:])  # the first observation is repeated
    later = episodes[0].features[1]
    assert not np.array_equal(later[:18], later[18:])


def test_returns_to_go_and_calibration():
    _, episodes, _ = collect(PointAdapter(), PointConfig(), 80, envs=4)
    won = next(episode for episode in episodes if episode.terminated)
    by_hand, steps = [], won.steps
    for chunk in range(len(won.rewards)):
        left = steps - 2 * chunk  # two steps per chunk; the last one succeeds and costs nothing
        by_hand.append(-sum(0.9**i for i in range(left - 1)))
    assert np.allclose(returns_to_go(won, tail=-123.0), by_hand)

    class Oracle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parameter = torch.nn.Parameter(torch.zeros(1))

        def value(self, features, u, chunks):
            assert u.shape == won.u.shape and chunks.shape == (len(won.u), 0)
            return torch.as_tensor(by_hand) + 2.0

    found = calibration(Oracle(), [won])
    assert found["calibration_bias"] == pytest.approx(2.0)
    assert found["calibration_rmse"] == pytest.approx(2.0)
    assert found["calibration_correlation"] == pytest.approx(1.0)
    assert calibration(Oracle(), []) == {}


def test_the_success_rate_is_that_of_the_last_episodes():
    metrics = RunMetrics(ProcessGroup(Accelerator(cpu=True)), ["push", "pull"])
    metrics.reported = True
    assert metrics.rates()["success_rate"] == 0.0
    for task, success in [("push", True)] + WINDOW * [("pull", False)] + [("push", True)]:
        metrics.add_episode(task, success, 1.0)
    found = metrics.rates()
    assert (found["success_rate"], found["success_window"]) == (pytest.approx(1 / WINDOW), WINDOW)
    assert (found["success_rate/push"], found["success_rate/pull"]) == (1.0, 0.0)
