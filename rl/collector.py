"""Collects transitions: the frozen policy acts on chosen noise, chunk by chunk, in many environments."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from trimtab.adapters import UserError
from trimtab.policies.noise_space import NoiseSpace
from trimtab.policies.sources import NoiseSource
from trimtab.rl.envs.chunk import ChunkResult
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.returns import NStepAccumulator, Transition, chunk_return, step_rewards
from trimtab.rl.runner import PolicyRunner


@dataclass
class Episode:
    """A finished training episode.

    Attributes:
        seed: its start.
        success: whether the environment ever reported success.
        steps: environment steps.
        terminated: ended in a terminal state, not at the time limit.
        features, u: what was seen and chosen at each chunk, (chunks, d) and (chunks, dim).
        rewards, discounts: of each chunk.
    """

    seed: int
    success: bool
    steps: int
    terminated: bool
    features: np.ndarray
    u: np.ndarray
    rewards: np.ndarray
    discounts: np.ndarray


@dataclass
class _Running:
    features: list[np.ndarray] = field(default_factory=list)
    u: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    discounts: list[float] = field(default_factory=list)
    steps: int = 0
    success: bool = False


class Collector:
    """Steps all environments by one chunk at a time.

    ``begin`` chooses noise, denoises and sets the simulators going; ``finish`` waits for them. What is
    done in between (learning) overlaps with the simulation. The noise of each environment comes from its
    own generator and its episodes from its own seeds, so a run repeats exactly.

    Args:
        runner: the frozen policy.
        vec: environments.
        space: noise space of the actor.
        gamma: discount per environment step.
        n_step: chunks per transition.
        reward: ``sparse`` or ``env`` (see ``returns.step_rewards``).
        seed: first of the training seeds; environment i takes seed + i, seed + i + num_envs, ...
    """

    def __init__(
        self,
        runner: PolicyRunner,
        vec: ChunkVectorEnv,
        space: NoiseSpace,
        gamma: float,
        n_step: int,
        reward: str,
        seed: int,
    ) -> None:
        self.runner, self.vec, self.space = runner, vec, space
        self.gamma, self.reward = gamma, reward
        self.env_steps = 0
        self.seconds = {"denoise": 0.0, "env_wait": 0.0}
        self._envs = list(range(vec.num_envs))
        self._seeds: list[Iterator[int]] = [_count(seed + i, vec.num_envs) for i in self._envs]
        self._next_seed = {i: next(self._seeds[i]) for i in self._envs}
        self._generators = [torch.Generator().manual_seed(seed + i) for i in self._envs]
        self._accumulators = [NStepAccumulator(n_step) for _ in self._envs]
        self._running = [_Running() for _ in self._envs]
        for i in self._envs:
            runner.forget(i)
        observations = vec.reset(self._take_seeds(self._envs))
        self._observe([observations[i] for i in self._envs])
        self.feature_dim = self._features.shape[1]
        self._u: np.ndarray | None = None

    def _take_seeds(self, envs: list[int]) -> dict[int, int]:
        taken = {i: self._next_seed[i] for i in envs}
        for i in envs:
            self._next_seed[i] = next(self._seeds[i])
        return taken

    def _observe(self, observations: list) -> None:
        self._conditioning = self.runner.encode(observations, self.vec.task_descriptions, self._envs)
        self._features = self.runner.features(self._conditioning)

    def begin(self, source: NoiseSource) -> None:
        """Choose noise with ``source``, denoise, and start stepping the chunks."""
        started = time.perf_counter()
        prior = torch.cat([self.runner.prior(1, generator) for generator in self._generators])
        noise = source(self._features, prior)
        if not torch.isfinite(noise).all():
            raise UserError("--rl.learning_rate", "the noise actor has diverged to NaN or Inf; lower it")
        actions = self.runner.decode(self._conditioning, noise, self._envs)
        self._lengths = [len(actions[i]) for i in self._envs]
        self._u = self.space.project(noise).float().cpu().numpy()
        self.seconds["denoise"] += time.perf_counter() - started
        started = time.perf_counter()  # without workers, sending is stepping
        self.vec.send({i: actions[i] for i in self._envs}, dict(self._next_seed))
        self.seconds["env_wait"] += time.perf_counter() - started

    def finish(self) -> tuple[list[Transition], list[Episode]]:
        """Wait for the simulators and return the transitions and episodes that are now complete."""
        started = time.perf_counter()
        results: dict[int, ChunkResult] = self.vec.receive()
        self.seconds["env_wait"] += time.perf_counter() - started
        started = time.perf_counter()
        before = self._features.numpy()
        ended = [i for i in self._envs if results[i].ended]
        self._take_seeds(ended)
        finals: dict[int, np.ndarray] = {}
        for i in ended:
            # A policy that remembers follows on from whole chunks only. Where the time limit cut the last one
            # short, the critic sees the final observation as an episode's first: the nearest state that the
            # policy can be in. (After a terminal state the value of what follows has no weight.)
            if results[i].steps < self._lengths[i]:
                self.runner.forget(i)
        if ended:
            conditioning = self.runner.encode(
                [results[i].final_observation for i in ended],
                [self.vec.task_descriptions[i] for i in ended],
                ended,
            )
            finals = dict(zip(ended, self.runner.features(conditioning).numpy(), strict=True))
        for i in ended:
            self.runner.forget(i)
        self._observe([results[i].observation for i in self._envs])
        after = self._features.numpy()
        transitions: list[Transition] = []
        episodes: list[Episode] = []
        for i in self._envs:
            result = results[i]
            reward, discount = chunk_return(step_rewards(result, self.reward), self.gamma, result.terminated)
            following = finals[i] if result.ended else after[i]
            transitions += self._accumulators[i].add(
                before[i], self._u[i], reward, discount, following, result.ended
            )
            self._note(i, before[i], reward, discount, result)
            if result.ended:
                episodes.append(self._close_episode(i, result))
            self.env_steps += result.steps
        self.seconds["denoise"] += time.perf_counter() - started
        return transitions, episodes

    def _note(
        self, i: int, features: np.ndarray, reward: float, discount: float, result: ChunkResult
    ) -> None:
        running = self._running[i]
        running.features.append(features)
        running.u.append(self._u[i])
        running.rewards.append(reward)
        running.discounts.append(discount)
        running.steps += result.steps
        running.success |= bool(result.successes.any())

    def _close_episode(self, i: int, result: ChunkResult) -> Episode:
        running, self._running[i] = self._running[i], _Running()
        return Episode(
            seed=result.seed,
            success=running.success,
            steps=running.steps,
            terminated=result.terminated,
            features=np.stack(running.features),
            u=np.stack(running.u),
            rewards=np.asarray(running.rewards),
            discounts=np.asarray(running.discounts),
        )


class SuccessWindow:
    """Success rate over the last ``size`` episodes."""

    def __init__(self, size: int) -> None:
        self._recent: deque[bool] = deque(maxlen=size)

    def add(self, success: bool) -> None:
        self._recent.append(success)

    @property
    def rate(self) -> float:
        return float(np.mean(self._recent)) if self._recent else 0.0

    def __len__(self) -> int:
        return len(self._recent)


def _count(start: int, step: int) -> Iterator[int]:
    while True:
        yield start
        start += step
