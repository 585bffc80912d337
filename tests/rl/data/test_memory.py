"""A policy that remembers its episode, run chunk by chunk in many environments, equals LeRobot's own loop."""

from dataclasses import dataclass, field
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import preprocess_observation

from tests.helpers.acting import Acts
from tests.helpers.point import PointAdapter, PointConfig
from tests.helpers.tiny import make_tiny
from trimtab.adapters import load_adapter
from trimtab.adapters.lerobot.injection import NoiseInjector
from trimtab.adapters.lerobot.lingbot_va import LingBotVAAdapter
from trimtab.policies.noise_samplers import base_noise
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.rl.algorithms import DSRLSACConfig
from trimtab.rl.collector import Collector
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import evaluate
from trimtab.rl.runner import PolicyRunner

FIRST, LATER = 8, 12  # steps of the tiny policy's chunks


class CameraEnv(gym.Env):
    """Two cameras see a scene that every action shifts. An even seed ends with a chunk, at the time limit;
    an odd one within a chunk, and of these every other (3, 7, ...) in a terminal state.

    Actions act through their signs, so that rounding cannot grow over an episode.
    """

    observation_space = gym.spaces.Dict(
        {
            "pixels": gym.spaces.Dict(
                {f"camera{i}": gym.spaces.Box(0, 255, (32, 32, 3), np.uint8) for i in (1, 2)}
            ),
            "agent_pos": gym.spaces.Box(-99, 99, (5,), np.float64),
        }
    )
    action_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    task_description = "push the red cube"
    executed: ClassVar[dict[int, list[np.ndarray]]] = {}  # by seed
    seen: ClassVar[dict[int, list[dict]]] = {}

    @staticmethod
    def length(seed):
        return FIRST + 2 * LATER if seed % 2 == 0 else FIRST + LATER + 3 + seed % 4

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.t = seed, 0
        self.scene = self.np_random.integers(0, 255, (2, 32, 32, 3)).astype(np.uint8)
        self.place = np.zeros(3)
        self.executed[seed], self.seen[seed] = [], [self._observation()]
        return self.seen[seed][0], {"is_success": False}

    def step(self, action):
        self.executed[self.seed].append(np.array(action))
        self.place += np.sign(action)
        self.t += 1
        self.seen[self.seed].append(self._observation())
        ended = self.t == self.length(self.seed)
        success = ended and self.seed % 4 == 3
        return self.seen[self.seed][-1], 0.0, success, ended and not success, {"is_success": success}

    def _observation(self):
        x, y, z = self.place.astype(int)
        views = [np.roll(view, (3 * x + self.t, 5 * y), (0, 1)) for view in self.scene]
        return {
            "pixels": {f"camera{i + 1}": np.ascontiguousarray(view) for i, view in enumerate(views)},
            "agent_pos": 0.05 * np.array([x, y, z, self.t % 7, 1.0]),
        }


@EnvConfig.register_subclass("test_cameras")
@dataclass
class CameraConfig(EnvConfig):
    task: str | None = "cameras"
    features: dict = field(default_factory=dict)
    features_map: dict = field(default_factory=dict)

    @property
    def gym_kwargs(self):
        return {}

    def create_envs(self, n_envs, use_async_envs=False):
        return {"test_cameras": {0: gym.vector.SyncVectorEnv([CameraEnv] * n_envs)}}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return load_adapter(make_tiny("lingbot_va", tmp_path_factory.mktemp("lingbot_va") / "policy"))


def chunks_of(seed):
    return 1 - (FIRST - CameraEnv.length(seed)) // LATER


def lerobots_actions(adapter, seed, noises):
    """One episode of LeRobot's `select_action`, one environment, with these noises."""
    draws = [draw for noise in noises for draw in (adapter.video_noise, adapter.native_noise(noise))]
    env = CameraEnv()
    observation, _ = env.reset(seed=seed)
    adapter.policy.reset()
    ended = False
    with NoiseInjector(draws) as injector:
        while not ended:
            batch = {**preprocess_observation(observation), "task": [env.task_description]}
            action = adapter.postprocessor(adapter.policy.select_action(adapter.preprocessor(batch)))
            observation, _, terminated, truncated, _ = env.step(action[0].numpy())
            ended = terminated or truncated
    injector.check("lingbot_va")
    return np.stack(env.executed[seed])


def run_evaluation(adapter, seeds, envs=2):
    """The actions of each episode of an evaluation, by seed."""
    config = CameraConfig()
    with ChunkVectorEnv(config, envs, 0, adapter.n_obs_steps) as vec:
        runner = PolicyRunner(adapter, config)
        outcome = evaluate(runner, vec, base_noise, seeds, progress=False)
    assert not runner._memory  # nothing is kept of episodes that are over
    assert outcome.steps.tolist() == [CameraEnv.length(seed) for seed in seeds]
    return {seed: np.stack(CameraEnv.executed[seed]) for seed in seeds}


def test_an_evaluation_equals_lerobots_loop(adapter):
    seeds = [11, 12, 13, 14, 15]
    found = run_evaluation(adapter, seeds)
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noises = [torch.randn((1, *adapter.noise_spec.shape), generator=generator) for _ in range(9)]
        expected = lerobots_actions(adapter, seed, noises[: chunks_of(seed)])
        assert found[seed].shape == expected.shape
        assert np.abs(found[seed] - expected).max() <= 1e-5


def test_the_memory_decides_what_is_done(adapter, monkeypatch):
    remembered = run_evaluation(adapter, [12], 1)[12]
    monkeypatch.setattr(LingBotVAAdapter, "remembers", False)
    forgetful = run_evaluation(adapter, [12], 1)[12]
    difference = np.abs(remembered - forgetful).max(-1)
    assert difference[:FIRST].max() == 0 and difference[FIRST : 2 * FIRST].min() > 1e-3


def at(adapter, seed, step):
    """The history that ends with an episode's observation ``step``, as the runner takes it."""
    seen = [CameraEnv.seen[seed][max(0, step - back)] for back in reversed(range(adapter.n_obs_steps))]
    cameras = seen[0]["pixels"]
    return {
        "pixels": {name: np.stack([frame["pixels"][name] for frame in seen]) for name in cameras},
        "agent_pos": np.stack([frame["agent_pos"] for frame in seen]),
    }


def test_a_collector_equals_lerobots_loop(adapter):
    config, gamma = CameraConfig(), 0.9
    runner = PolicyRunner(adapter, config)
    transitions, episodes = [], []
    with ChunkVectorEnv(config, 2, 0, adapter.n_obs_steps) as vec:
        space = FullNoiseConfig(bound=50.0).build(adapter.noise_spec)
        collector = Collector(runner, vec, DSRLSACConfig(gamma=gamma, n_step=1), "sparse", seed=20)
        collector.start(Acts(space))
        generators = [torch.Generator().manual_seed(20 + env) for env in range(2)]
        while len(episodes) < 6:  # environment 0: 20, 22, ...; environment 1: 21, 23, ...
            collector.begin()
            more, ended = collector.finish()
            transitions += more
            episodes += ended
    by_start = {t.features.tobytes(): t for t in transitions}
    task = [CameraEnv.task_description]
    assert {20, 21, 22, 23} <= {episode.seed for episode in episodes}
    for episode in sorted(episodes, key=lambda episode: episode.seed):
        seed, chunks = episode.seed, chunks_of(episode.seed)
        found, generator = np.stack(CameraEnv.executed[seed]), generators[seed % 2]
        noises = [runner.prior(1, generator) for _ in range(chunks)]
        assert np.array_equal(episode.u, torch.cat(noises).flatten(1).numpy())
        expected = lerobots_actions(adapter, seed, noises)
        assert found.shape == expected.shape and np.abs(found - expected).max() <= 1e-5

        lengths = [FIRST, *[LATER] * (chunks - 2), CameraEnv.length(seed) - FIRST - (chunks - 2) * LATER]
        terminated = seed % 4 == 3
        assert episode.steps == sum(lengths) and episode.terminated == terminated
        assert np.allclose(
            episode.discounts[:-1], [gamma**length for length in lengths[:-1]]
        ) and episode.discounts[-1] == pytest.approx(0.0 if terminated else gamma ** lengths[-1])
        for chunk in range(chunks - 1):
            after = by_start[episode.features[chunk].tobytes()].next_features
            assert np.array_equal(after, episode.features[chunk + 1])
        # The last observation follows on from a whole chunk; after a part of one it is seen afresh.
        final = at(adapter, seed, sum(lengths))
        fresh = runner.features(runner.encode([final], task))[0].numpy()
        got = by_start[episode.features[-1].tobytes()].next_features
        if lengths[-1] < LATER:
            assert np.allclose(got, fresh, atol=1e-5)
            continue
        slot, step = 7, 0
        for noise, length in zip(noises, lengths, strict=True):
            encoded = runner.encode([at(adapter, seed, step)], task, [slot])
            runner.decode(encoded, noise, [slot])
            step += length
        followed = runner.features(runner.encode([final], task, [slot]))[0].numpy()
        runner.forget(slot)
        assert np.allclose(got, followed, atol=1e-5) and not np.allclose(got, fresh, atol=1e-3)


def test_a_look_changes_nothing(adapter):
    runner = PolicyRunner(adapter, CameraConfig())
    CameraEnv().reset(seed=40)
    start, task = at(adapter, 40, 0), [CameraEnv.task_description]
    noise = runner.prior(1, torch.Generator().manual_seed(0))
    plain = runner.encode([start], task)
    assert np.array_equal(runner.decode(plain, noise)[0], runner.decode([plain], noise)[0])
    assert not runner._memory  # without slots nothing is kept
    assert runner.decode(runner.encode([start], task, [3]), noise, [3])[0].shape == (FIRST, 3)
    once = runner.decode(runner.encode([start], task, [3]), noise)[0]
    runner.decode(runner.encode([start], task), noise)
    assert once.shape == (LATER, 3)
    assert np.array_equal(once, runner.decode(runner.encode([start], task, [3]), noise)[0])
    runner.forget(3)
    assert runner.decode(runner.encode([start], task, [3]), noise, [3])[0].shape == (FIRST, 3)


class RememberingPoint(PointAdapter):
    remembers = True


def test_following_is_encoding_where_a_policy_says_nothing_else():
    def run(adapter):
        with ChunkVectorEnv(PointConfig(), 3, 0) as vec:
            runner = PolicyRunner(adapter, PointConfig())
            return evaluate(runner, vec, base_noise, range(500, 510), progress=False)

    plain, remembering = run(PointAdapter()), run(RememberingPoint())
    assert np.array_equal(plain.successes, remembering.successes)
    assert np.array_equal(plain.steps, remembering.steps)
