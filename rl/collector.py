"""Collects transitions: the frozen policy acts on chosen noise, chunk by chunk, in many environments."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trimtab.policies.acting import Candidates, Choice, Denoise
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.data.decoder import ConditioningSpec
from trimtab.rl.data.returns import NStepAccumulator, Returns, Transition
from trimtab.rl.data.rows import observation_rows
from trimtab.rl.envs.chunk import ChunkResult, RawObservation
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.runner import Encoded, PolicyRunner


@dataclass
class Episode:
    """A finished training episode.

    Attributes:
        seed: its start.
        success: whether the environment ever reported success.
        steps: environment steps.
        terminated: ended in a terminal state, not at the time limit.
        features, u: what was seen and chosen at each chunk, (chunks, d) and (chunks, dim).
        chunks: what was executed, (chunks, steps * action_dim), normalised.
        rewards, discounts: of each chunk.
        steered: whether the learner's policy acted in it, from start to end.
        task: its name, where the environment has one.
    """

    seed: int
    success: bool
    steps: int
    terminated: bool
    features: np.ndarray
    u: np.ndarray
    rewards: np.ndarray
    discounts: np.ndarray
    chunks: np.ndarray
    steered: bool = True
    task: str = ""
    # Undiscounted sum of the environment's own rewards.
    total: float = 0.0


class Learner(Protocol):
    """Who acts in training episodes: an ``Algorithm`` (``rl/algorithms/acting.py`` says what each does)."""

    draws: int

    def propose(self, features: Tensor, prior: Tensor, denoise: Denoise, steering: bool) -> Candidates: ...

    def act(
        self,
        features: Tensor,
        prior: Tensor,
        denoise: Denoise,
        candidates: Candidates | None,
        steered: Tensor,
    ) -> Choice: ...


@dataclass(frozen=True)
class _AmongCandidates:
    """A learner at observations whose candidates are known, as a ``ChunkPolicy``."""

    learner: Learner
    candidates: Candidates | None
    steered: Tensor

    @property
    def draws(self) -> int:
        return self.learner.draws

    def act(self, features: Tensor, prior: Tensor, denoise: Denoise) -> Choice:
        return self.learner.act(features, prior, denoise, self.candidates, self.steered)


@dataclass
class _Running:
    features: list[np.ndarray] = field(default_factory=list)
    u: list[np.ndarray] = field(default_factory=list)
    chunks: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    discounts: list[float] = field(default_factory=list)
    steps: int = 0
    success: bool = False
    total: float = 0.0
    steered: bool = True
    # What it takes to come here again: see ``resume.return_to``.
    seed: int = -1
    actions: list[np.ndarray] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)


class Collector:
    """Steps all environments by one chunk at a time.

    ``begin`` lets the learner act and sets the simulators going; ``finish`` waits for them. What is done in
    between (learning) overlaps with the simulation. The noise of each environment comes from its own
    generator and its episodes from its own seeds, so a run repeats exactly.

    Args:
        runner: the frozen policy.
        vec: environments.
        rl: the algorithm's config: discount, length of returns, candidates, and what the replay keeps.
        reward: ``sparse`` or ``env`` (see ``returns.Returns``).
        seed: first of the training seeds; environment i takes seed + i, seed + i + num_envs, ...
        rank, processes: of a run in several; their episodes have different seeds.
        record: note what it takes to come back to the middle of the running episodes.

    Attributes:
        spec: of the conditioning, where the replay keeps that.
        lost: faults since the last ``finish``, which each lost an episode: kind, and what was said.
        reported: whether an environment has reported success or failure so far.
        assign: asked when an episode starts: whether what is learnt acts in it.
    """

    def __init__(
        self,
        runner: PolicyRunner,
        vec: ChunkVectorEnv,
        rl: AlgorithmConfig,
        reward: str,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        record: bool = False,
    ) -> None:
        self.runner, self.vec, self.rl, self.record = runner, vec, rl, record
        self.rank, self.processes = rank, processes
        steps = runner.adapter.chunk_shape[0]
        self.returns = Returns(reward, rl.gamma, rl.discount_per, steps, rl.bootstrap_at_time_limit)
        self.lost: list[tuple[str, str]] = []
        self.reported = False
        self.env_steps = 0
        self.seconds = {"denoise": 0.0, "env_wait": 0.0, "env_busy": 0.0, "env_idle": 0.0}
        self._envs = list(range(vec.num_envs))
        self.seed, first = seed, seed + rank * vec.num_envs
        self._next_seed = {i: first + i for i in self._envs}
        self._generators = [torch.Generator().manual_seed(first + i) for i in self._envs]
        self._accumulators = [NStepAccumulator(rl.n_step) for _ in self._envs]
        self.assign: Callable[[], bool] = lambda: True
        self._running = [_Running() for _ in self._envs]
        self._steering = False
        for i in self._envs:
            runner.forget(i)
        taken = self._take_seeds(self._envs)
        observations = vec.reset(taken)
        self._look([observations[i] for i in self._envs])
        for i in self._envs:
            self._running[i].seed = taken[i]
            self._note_observation(i, observations[i])
        self.feature_dim = self._features.shape[1]
        keeps = "conditioning" in rl.replayed
        self.spec = ConditioningSpec.of(runner.adapter, self._conditioning) if keeps else None

    def start(self, learner: Learner) -> None:
        """Let ``learner`` act from here on."""
        self.learner = learner
        self._candidates = self._propose(self._conditioning, self._features, self._generators)

    def unsteer(self) -> None:
        """Leave the episodes that run now to the untrained policy."""
        for running in self._running:
            running.steered = False

    def _take_seeds(self, envs: list[int]) -> dict[int, int]:
        taken = {i: self._next_seed[i] for i in envs}
        for i in envs:
            self._next_seed[i] += self.vec.num_envs * self.processes
        return taken

    def _note_observation(self, i: int, observation: RawObservation) -> None:
        if self.record:
            self._running[i].digests.append(digest(observation))

    def _look(self, observations: list) -> None:
        self._conditioning = self.runner.encode(observations, self.vec.task_descriptions, self._envs)
        self._features = self.runner.features(self._conditioning)

    def _propose(
        self, conditioning: Encoded, features: Tensor, generators: list[torch.Generator]
    ) -> Candidates | None:
        """Draw and decode candidates of each observation, where the algorithm learns from them."""
        if not self.rl.candidates:
            return None
        prior = self.runner.priors(self.rl.candidates, generators)
        return self.learner.propose(
            features, prior, partial(self.runner.denoise, conditioning), self._steering
        )

    def begin(self, steering: bool = True) -> None:
        """Let the learner act, and start stepping the chunks.

        Args:
            steering: whether what has been learnt acts, in the episodes that are steered; else the untrained
                policy acts everywhere.
        """
        started = time.perf_counter()
        self._steering = steering
        prior = self.runner.priors(self.learner.draws, self._generators)
        steered = torch.tensor([steering and running.steered for running in self._running])
        acting = _AmongCandidates(self.learner, self._candidates, steered)
        choice, actions = self.runner.act(acting, self._conditioning, self._features, prior, self._envs)
        self._u = choice.u.float().cpu().numpy()
        self._chunks = choice.chunk.float().flatten(1).cpu().numpy()
        self._lengths = [len(action) for action in actions]
        self.seconds["denoise"] += time.perf_counter() - started
        if self.record:
            for i in self._envs:
                self._running[i].actions.append(np.array(actions[i]))
        started = time.perf_counter()  # without workers, sending is stepping
        self.vec.send(dict(enumerate(actions)), dict(self._next_seed))
        self.seconds["env_wait"] += time.perf_counter() - started

    def finish(self) -> tuple[list[Transition], list[Episode]]:
        """Wait for the simulators and return the transitions and episodes that are now complete."""
        started = time.perf_counter()
        results: dict[int, ChunkResult] = self.vec.receive()
        self.seconds["env_wait"] += time.perf_counter() - started
        self.seconds["env_busy"] += self.vec.busy
        self.seconds["env_idle"] += self.vec.idle
        started = time.perf_counter()
        before = observation_rows(self._features, self._candidates, self._conditioning, self.spec)
        ended = [i for i in self._envs if results[i].ended]
        lost = [i for i in self._envs if results[i].lost]
        taken = self._take_seeds([*ended, *lost])
        for i in lost:
            self._drop(i, *results[i].lost)
        finals = []
        if ended:
            conditioning = self.runner.encode_finals(
                {i: results[i] for i in ended}, self._lengths, self.vec.task_descriptions
            )
            features = self.runner.features(conditioning)
            proposed = self._propose(conditioning, features, [self._generators[i] for i in ended])
            finals = observation_rows(features, proposed, conditioning, self.spec)
        self._look([results[i].observation for i in self._envs])
        self._candidates = self._propose(self._conditioning, self._features, self._generators)
        following = observation_rows(self._features, self._candidates, self._conditioning, self.spec)
        for i, row in zip(ended, finals, strict=True):
            following[i] = row
        transitions: list[Transition] = []
        episodes: list[Episode] = []
        for i in self._envs:
            result = results[i]
            if result.lost:
                continue
            running = self._running[i]
            running.success |= bool(result.successes.any())
            reward, discount = self.returns.of(result, running.success)
            (features, kept), (next_features, next_kept) = before[i], following[i]
            kept["chunk"] = self._chunks[i]
            transitions += self._accumulators[i].add(
                features, self._u[i], reward, discount, next_features, result.ended, kept, next_kept
            )
            self._note(i, features, reward, discount, result)
            if result.ended:
                episodes.append(self._close_episode(i, result))
            self.env_steps += result.steps
        for i in self._envs:
            self._running[i].seed = taken.get(i, self._running[i].seed)
            self._note_observation(i, results[i].observation)
        self.seconds["denoise"] += time.perf_counter() - started
        return transitions, episodes

    def _drop(self, i: int, kind: str, message: str) -> None:
        """Forget an episode that was lost, with what it had begun to tell."""
        self.lost.append((kind, message))
        self.runner.forget(i)
        self._accumulators[i].clear()
        self._running[i] = _Running(steered=self.assign())

    def _note(
        self, i: int, features: np.ndarray, reward: float, discount: float, result: ChunkResult
    ) -> None:
        running = self._running[i]
        running.features.append(features)
        running.u.append(self._u[i])
        running.chunks.append(self._chunks[i])
        running.rewards.append(reward)
        running.discounts.append(discount)
        running.steps += result.steps
        running.total += float(result.rewards.sum())
        self.reported |= result.success_key is not None or running.success

    def _close_episode(self, i: int, result: ChunkResult) -> Episode:
        running, self._running[i] = self._running[i], _Running(steered=self.assign())
        return Episode(
            seed=result.seed,
            success=running.success,
            steps=running.steps,
            terminated=result.terminated,
            features=np.stack(running.features),
            u=np.stack(running.u),
            rewards=np.asarray(running.rewards),
            discounts=np.asarray(running.discounts),
            steered=running.steered,
            task=self.vec.task_names[i],
            chunks=np.stack(running.chunks),
            total=running.total,
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

    def state_dict(self) -> list[bool]:
        return list(self._recent)

    def load_state_dict(self, state: list[bool]) -> None:
        self._recent.clear()
        self._recent.extend(state)


def digest(observation: RawObservation) -> str:
    """A short hash of an observation history."""
    found = hashlib.blake2b(digest_size=16)

    def take(value: Any) -> None:
        for key in sorted(value):
            found.update(key.encode())
            if isinstance(value[key], dict):
                take(value[key])
            else:
                array = np.ascontiguousarray(value[key])
                found.update(f"{array.dtype}{array.shape}".encode())
                found.update(array.tobytes())

    take(observation)
    return found.hexdigest()
