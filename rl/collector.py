"""Collects transitions: the frozen policy acts on chosen noise, chunk by chunk, in many environments."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trimtab.adapters import UserError
from trimtab.policies.noise_samplers import NoiseSource, own_noise, prior_noise
from trimtab.policies.noise_space import NoiseSpace
from trimtab.rl.data.decoder import ConditioningSpec
from trimtab.rl.data.returns import NStepAccumulator, Returns, Transition
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
        chunks: what was executed, (chunks, steps * action_dim), normalised; empty where it is not kept.
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
    steered: bool = True
    task: str = ""
    chunks: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    # Undiscounted sum of the environment's own rewards.
    total: float = 0.0


@dataclass
class Candidates:
    """Noises drawn for each of B observations, and what the policy makes of them.

    Attributes:
        u: (B, K, dim) in the noise space.
        chunks: (B, K, steps, action_dim), normalised.
    """

    u: np.ndarray
    chunks: Tensor

    def row(self, i: int) -> dict[str, np.ndarray]:
        """Those of observation ``i``, as the replay keeps them."""
        return {"candidates": self.chunks[i].flatten(1).numpy(), "candidates_u": self.u[i]}


class Acting(Protocol):
    """Chooses among candidate chunks."""

    def __call__(self, features: Tensor, chunks: Tensor) -> Tensor:
        """(B, d), (B, K, steps * action_dim) -> (B,) index of the chunk to execute."""
        ...


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
    noise: list[Tensor] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)


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
        reward: ``sparse`` or ``env`` (see ``returns.Returns``).
        seed: first of the training seeds; environment i takes seed + i, seed + i + num_envs, ...
        candidates: noises that are decoded for every observation beside the one that acts; they share its
            encoding. What they become is stored with the transitions: ``chunk``, ``candidates`` (K, A) and
            ``candidates_u`` (K, dim), A = steps * action_dim.
        proposed: how many of them ``proposer`` chooses, once there is one.
        discount_per: ``step`` or ``chunk`` (see ``returns.chunk_return``).
        bootstrap_at_time_limit: whether what follows a time limit has a value.
        conditioning: store ``chunk`` and each observation's conditioning with the transitions (see
            ``decoder.ConditioningSpec``).
        place: (rank, processes) of a run in several; their episodes have different seeds.
        record: note what it takes to come back to the middle of the running episodes.
        own: whether candidates are made of the noise that the base feeds itself, not of the noise space's.

    Attributes:
        spec: of the conditioning, where that is stored.
        lost: faults since the last ``finish``, which each lost an episode: kind, and what was said.
        reported: whether an environment has reported success or failure so far.
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
        candidates: int = 0,
        proposed: int = 0,
        discount_per: str = "step",
        bootstrap_at_time_limit: bool = True,
        conditioning: bool = False,
        place: tuple[int, int] = (0, 1),
        record: bool = False,
        own: bool = False,
    ) -> None:
        self.place, self.record = place, record
        self.lost: list[tuple[str, str]] = []
        self.reported = False
        self.candidates = candidates
        steps = runner.adapter.chunk_shape[0]
        self.returns = Returns(reward, gamma, discount_per, steps, bootstrap_at_time_limit)
        self._draw_candidates = own_noise(runner.adapter.noise_spec) if own else prior_noise(space)
        # Who chooses the last ``proposed`` candidates of each observation, (B, proposed, *spec.shape) of as
        # many draws; ``None``: they are drawn like the others.
        self.proposer: NoiseSource | None = None
        self.proposed = proposed
        self.runner, self.vec, self.space = runner, vec, space
        self.env_steps = 0
        self.seconds = {"denoise": 0.0, "env_wait": 0.0, "env_busy": 0.0, "env_idle": 0.0}
        self._envs = list(range(vec.num_envs))
        self.seed, first = seed, seed + place[0] * vec.num_envs
        self._next_seed = {i: first + i for i in self._envs}
        self._generators = [torch.Generator().manual_seed(first + i) for i in self._envs]
        self._accumulators = [NStepAccumulator(n_step) for _ in self._envs]
        # Asked when an episode starts: whether the learner's policy acts in it.
        self.assign: Callable[[], bool] = lambda: True
        self._running = [_Running() for _ in self._envs]
        for i in self._envs:
            runner.forget(i)
        taken = self._take_seeds(self._envs)
        observations = vec.reset(taken)
        self._observe([observations[i] for i in self._envs])
        for i in self._envs:
            self._running[i].seed = taken[i]
            self._note_observation(i, observations[i])
        self.feature_dim = self._features.shape[1]
        self.spec = ConditioningSpec.of(runner.adapter, self._conditioning) if conditioning else None
        self._u: np.ndarray | None = None

    def unsteer(self) -> None:
        """Leave the episodes that run now to the untrained actor."""
        for running in self._running:
            running.steered = False

    def _take_seeds(self, envs: list[int]) -> dict[int, int]:
        taken = {i: self._next_seed[i] for i in envs}
        for i in envs:
            self._next_seed[i] += self.vec.num_envs * self.place[1]
        return taken

    def _note_observation(self, i: int, observation: RawObservation) -> None:
        if self.record:
            self._running[i].digests.append(digest(observation))

    def _observe(self, observations: list) -> None:
        self._conditioning = self.runner.encode(observations, self.vec.task_descriptions, self._envs)
        self._features = self.runner.features(self._conditioning)
        self._candidates = None
        if self.candidates:
            self._candidates = self._propose(self._conditioning, self._features, self._generators)

    def _propose(
        self, conditioning: Encoded, features: Tensor, generators: list[torch.Generator]
    ) -> Candidates:
        """Draw and decode candidates of each observation."""
        prior = torch.stack([self.runner.prior(self.candidates, generator) for generator in generators])
        noise = self._draw_candidates(None, prior.flatten(0, 1))
        if self.proposer is not None and self.proposed:
            own = self.proposer(features, prior[:, -self.proposed :])
            noise = noise.unflatten(0, prior.shape[:2])
            noise[:, -self.proposed :] = own
            noise = noise.flatten(0, 1)
        u = self.space.project(noise, prior.flatten(0, 1)).float().cpu().unflatten(0, prior.shape[:2])
        chunks = self.runner.candidates(conditioning, noise.unflatten(0, prior.shape[:2]))
        return Candidates(u.numpy(), chunks)

    def begin(self, source: NoiseSource, untrained: NoiseSource | None = None) -> None:
        """Choose noise with ``source``, denoise, and start stepping the chunks.

        Args:
            source: the learner's policy.
            untrained: acts instead in the episodes that are not steered; default: ``source``.
        """
        started = time.perf_counter()
        prior = torch.cat([self.runner.prior(1, generator) for generator in self._generators])
        noise = source(self._features, prior)
        steered = torch.tensor([running.steered for running in self._running])
        if untrained is not None and not steered.all():
            noise[~steered] = untrained(self._features, prior)[~steered]
        if not torch.isfinite(noise).all():
            raise UserError("--rl.learning_rate", "the noise actor has diverged to NaN or Inf; lower it")
        self._u = self.space.project(noise, prior).float().cpu().numpy()
        # What is stored of the chunk is what the policy made, not what the robot gets.
        if self.candidates or self.spec:
            chunks = self.runner.candidates(self._conditioning, noise.unsqueeze(1))[:, 0]
            self._start(chunks, started)
            return
        actions = self.runner.decode(self._conditioning, noise, self._envs)
        if self.record and self.runner.adapter.remembers:
            for i in self._envs:
                self._running[i].noise.append(noise[i].clone())
        self._lengths = [len(actions[i]) for i in self._envs]
        self._send(actions, started)

    def begin_among(self, choose: Acting | None) -> None:
        """Execute one of the candidates of each observation, and start stepping the chunks.

        Args:
            choose: the learner's choice. In episodes that are not steered, and where it is ``None``, the
                first candidate acts: a draw from the prior like any other.
        """
        started = time.perf_counter()
        index = torch.zeros(len(self._envs), dtype=torch.long)
        if choose is not None:
            steered = torch.tensor([running.steered for running in self._running])
            chosen = choose(self._features, self._candidates.chunks.flatten(2)).cpu()
            index = torch.where(steered, chosen, index)
        rows = torch.arange(len(self._envs))
        self._u = self._candidates.u[rows, index]
        self._start(self._candidates.chunks[rows, index], started)

    def begin_corrected(self, correct: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        """Execute the base's own chunk with the learner's correction, and start stepping the chunks.

        Args:
            correct: features and chunks -> what is executed. In episodes that are not steered, and where it
                is ``None``, the base acts.
        """
        started = time.perf_counter()
        chunks = self._candidates.chunks[:, 0]
        if correct is not None:
            steered = torch.tensor([running.steered for running in self._running])
            chunks = torch.where(steered[:, None, None], correct(self._features, chunks), chunks)
            if not torch.isfinite(chunks).all():
                raise UserError(
                    "--rl.learning_rate", "the residual actor has diverged to NaN or Inf; lower it"
                )
        self._u = self._candidates.u[:, 0]
        self._start(chunks, started)

    def _start(self, chunks: Tensor, started: float) -> None:
        self._chunks = chunks.flatten(1).numpy()
        actions = self.runner.executable(chunks, self._conditioning)
        self._lengths = [len(actions[i]) for i in self._envs]
        self._send(actions, started)

    def _send(self, actions: Any, started: float) -> None:
        self.seconds["denoise"] += time.perf_counter() - started
        if self.record:
            for i in self._envs:
                self._running[i].actions.append(np.array(actions[i]))
        started = time.perf_counter()  # without workers, sending is stepping
        self.vec.send({i: actions[i] for i in self._envs}, dict(self._next_seed))
        self.seconds["env_wait"] += time.perf_counter() - started

    def finish(self) -> tuple[list[Transition], list[Episode]]:
        """Wait for the simulators and return the transitions and episodes that are now complete."""
        started = time.perf_counter()
        results: dict[int, ChunkResult] = self.vec.receive()
        self.seconds["env_wait"] += time.perf_counter() - started
        self.seconds["env_busy"] += self.vec.busy
        self.seconds["env_idle"] += self.vec.idle
        started = time.perf_counter()
        before, proposed_before = self._features.numpy(), self._candidates
        conditioned_before = self._conditioning
        ended = [i for i in self._envs if results[i].ended]
        lost = [i for i in self._envs if results[i].lost]
        taken = self._take_seeds([*ended, *lost])
        for i in lost:
            self._drop(i, *results[i].lost)
        finals: dict[int, np.ndarray] = {}
        final_extra: dict[int, dict[str, np.ndarray]] = {}
        if ended:
            conditioning = self.runner.encode_finals(
                {i: results[i] for i in ended}, self._lengths, self.vec.task_descriptions
            )
            features = self.runner.features(conditioning)
            finals = dict(zip(ended, features.numpy(), strict=True))
            if self.candidates:
                proposed = self._propose(conditioning, features, [self._generators[i] for i in ended])
                final_extra = {i: proposed.row(row) for row, i in enumerate(ended)}
            if self.spec:
                for row, i in enumerate(ended):
                    final_extra[i] = final_extra.get(i, {}) | self.spec.row(conditioning, row)
        self._observe([results[i].observation for i in self._envs])
        after = self._features.numpy()
        transitions: list[Transition] = []
        episodes: list[Episode] = []
        for i in self._envs:
            result = results[i]
            if result.lost:
                continue
            running = self._running[i]
            running.success |= bool(result.successes.any())
            reward, discount = self.returns.of(result, running.success)
            following = finals[i] if result.ended else after[i]
            kept: dict[str, np.ndarray] = {}
            next_kept: dict[str, np.ndarray] = {}
            if self.candidates or self.spec:
                kept["chunk"] = self._chunks[i]
            if self.candidates:
                kept |= proposed_before.row(i)
                next_kept |= {} if result.ended else self._candidates.row(i)
            if self.spec:
                kept |= self.spec.row(conditioned_before, i)
                next_kept |= {} if result.ended else self.spec.row(self._conditioning, i)
            if result.ended:
                next_kept |= final_extra.get(i, {})
            transitions += self._accumulators[i].add(
                before[i], self._u[i], reward, discount, following, result.ended, kept, next_kept
            )
            self._note(i, before[i], reward, discount, result)
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
        if self.candidates or self.spec:
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
            chunks=np.stack(running.chunks) if running.chunks else np.zeros((0, 0), np.float32),
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
