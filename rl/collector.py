"""Collects transitions: the frozen policy acts on chosen noise, chunk by chunk, in many environments."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.policies.acting import Candidates, Choice, Denoise
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.algorithms.acting import BehaviorPolicy
from trimtab.rl.data.decoder import ConditioningSpec
from trimtab.rl.data.memory import Row, observation_rows
from trimtab.rl.data.returns import NStepAccumulator, Returns, Transition
from trimtab.rl.envs.chunk import ChunkResult
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.rollout import Rollout
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
        chunks: what was executed, (chunks, steps * action_dim), normalised; (chunks, 0) where the replay does
            not keep it.
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


@dataclass
class _Running:
    """What a running episode has told so far."""

    features: list[np.ndarray] = field(default_factory=list)
    u: list[np.ndarray] = field(default_factory=list)
    chunks: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    discounts: list[float] = field(default_factory=list)
    steps: int = 0
    success: bool = False
    total: float = 0.0
    steered: bool = True


@dataclass(frozen=True)
class _Exploring:
    """A learner in the episodes that run now, as a ``ChunkPolicy``."""

    learner: BehaviorPolicy
    candidates: Candidates | None
    steered: Tensor

    @property
    def draws(self) -> int:
        return self.learner.draws

    def act(self, features: Tensor, prior: Tensor, denoise: Denoise) -> Choice:
        return self.learner.act(features, prior, denoise, self.candidates, self.steered)


class Collector:
    """Makes transitions of what a learner does in all environments, a chunk at a time.

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
        self.runner, self.vec, self.rl = runner, vec, rl
        self.returns = Returns(
            reward, rl.gamma, rl.discount_per, runner.adapter.chunk_shape[0], rl.bootstrap_at_time_limit
        )
        self.lost: list[tuple[str, str]] = []
        self.reported = False
        self.env_steps = 0
        self.assign: Callable[[], bool] = lambda: True
        self._steering = False
        envs, stride = range(vec.num_envs), vec.num_envs * processes
        self.first_seed = seed + rank * vec.num_envs
        self._accumulators = [NStepAccumulator(rl.n_step) for _ in envs]
        self._running = [_Running() for _ in envs]
        self.rollout = Rollout(
            runner,
            vec,
            lambda i, seed: self.first_seed + i if seed is None else seed + stride,
            per_episode=False,
            record=record,
        )
        self.rollout.encode_observations()
        keeps = "conditioning" in rl.replayed
        self.spec = ConditioningSpec.of(runner.adapter, self.rollout.encoded) if keeps else None

    @property
    def feature_dim(self) -> int:
        """Length of an observation as the learner sees it."""
        return self.rollout.features.shape[1]

    @property
    def seconds(self) -> dict[str, float]:
        """See ``Rollout``."""
        return self.rollout.seconds

    def start(self, learner: BehaviorPolicy) -> None:
        """Let ``learner`` act from here on."""
        self.learner = learner
        self._propose_here()

    def unsteer(self) -> None:
        """Leave the episodes that run now to the untrained policy."""
        for running in self._running:
            running.steered = False

    def _propose_here(self) -> None:
        rollout = self.rollout
        self._candidates = self._propose(rollout.encoded, rollout.features, rollout.envs)

    def _propose(self, encoded: Encoded, features: Tensor, envs: list[int]) -> Candidates | None:
        """Draw and decode candidates of each observation, where the algorithm learns from them."""
        if not self.rl.candidates:
            return None
        prior, denoise = self.rollout.prior(self.rl.candidates, envs), partial(self.runner.denoise, encoded)
        return self.learner.propose(features, prior, denoise, self._steering)

    def begin(self, steering: bool = True) -> None:
        """Let the learner act, and start stepping the chunks.

        Args:
            steering: whether what has been learnt acts, in the episodes that are steered; else the untrained
                policy acts everywhere.
        """
        self._steering = steering
        steered = torch.tensor([steering and running.steered for running in self._running])
        choice = self.rollout.begin(_Exploring(self.learner, self._candidates, steered))
        self._u = choice.u.float().cpu().numpy()
        self._chunks = choice.chunk.float().flatten(1).cpu().numpy()

    def finish(self) -> tuple[list[Transition], list[Episode]]:
        """Wait for the simulators and return the transitions and episodes that are now complete."""
        rollout = self.rollout
        results, began = rollout.receive(), dict(rollout.episode)
        started = time.perf_counter()
        before = observation_rows(rollout.features, self._candidates, rollout.encoded, self.spec)
        for i, result in results.items():
            if result.lost:
                self.lost.append(result.lost)
                self._accumulators[i].clear()
                self._running[i] = _Running(steered=self.assign())
        ended, encoded = rollout.final_observations()
        finals = []
        if ended:
            features = self.runner.features(encoded)
            finals = observation_rows(features, self._propose(encoded, features, ended), encoded, self.spec)
        rollout.start_next_episodes()
        rollout.encode_observations()
        self._propose_here()
        after = observation_rows(rollout.features, self._candidates, rollout.encoded, self.spec)
        for i, row in zip(ended, finals, strict=True):
            after[i] = row
        transitions: list[Transition] = []
        episodes: list[Episode] = []
        for i, result in results.items():
            if result.lost:
                continue
            transitions += self._add(i, result, before[i], after[i])
            if result.ended:
                episodes.append(self._close_episode(i, result, began[i]))
            self.env_steps += result.steps
        self.seconds["denoise"] += time.perf_counter() - started
        return transitions, episodes

    def _add(self, i: int, result: ChunkResult, before: Row, after: Row) -> list[Transition]:
        """Take an executed chunk into the running episode; returns the transitions that it completes."""
        running, (features, kept), (next_features, next_kept) = self._running[i], before, after
        running.success |= bool(result.successes.any())
        reward, discount = self.returns.reward_and_discount(result, running.success)
        running.features.append(features)
        running.u.append(self._u[i])
        if "chunk" in self.rl.replayed:  # else nothing judges them, and some policies' differ in length
            running.chunks.append(self._chunks[i])
        running.rewards.append(reward)
        running.discounts.append(discount)
        running.steps += result.steps
        running.total += float(result.rewards.sum())
        self.reported |= result.success_key is not None or running.success
        kept["chunk"] = self._chunks[i]
        chunk = Transition(features, self._u[i], reward, discount, next_features, kept)
        return self._accumulators[i].add(chunk, result.ended, next_kept)

    def _close_episode(self, i: int, result: ChunkResult, seed: int) -> Episode:
        running, self._running[i] = self._running[i], _Running(steered=self.assign())
        return Episode(
            seed=seed,
            success=running.success,
            steps=running.steps,
            terminated=result.terminated,
            features=np.stack(running.features),
            u=np.stack(running.u),
            rewards=np.asarray(running.rewards),
            discounts=np.asarray(running.discounts),
            steered=running.steered,
            task=self.vec.task_names[i],
            chunks=np.stack(running.chunks) if running.chunks else np.zeros((len(running.u), 0), np.float32),
            total=running.total,
        )

    def state_dict(self) -> dict[str, Any]:
        """All but the simulators, environment by environment, between two chunks."""
        drawn = self._candidates
        own = [
            {
                "pending": self._accumulators[i].state_dict(),
                "running": dict(vars(self._running[i])),
                "candidates": None if drawn is None else {"u": drawn.u[i], "chunks": drawn.chunks[i]},
            }
            for i in range(self.vec.num_envs)
        ]
        envs = [mine | {"rollout": state} for mine, state in zip(own, self.rollout.state_dict(), strict=True)]
        return {"env_steps": self.env_steps, "seconds": dict(self.seconds), "envs": envs}

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """Put a new collector where it was, as far as its environments repeat their episodes.

        Args:
            state: from ``state_dict``; ``None`` among its ``envs`` begins anew.

        Returns:
            how many running episodes could not be repeated and were dropped.
        """
        self.env_steps = state["env_steps"]
        self.seconds.update(state["seconds"])
        saved = {i: one for i, one in enumerate(state["envs"]) if one is not None}
        back = self.rollout.load_state_dict({i: one["rollout"] for i, one in saved.items()})
        self._running = [
            _Running(**saved[i]["running"]) if i in back else _Running(steered=self.assign())
            for i in range(self.vec.num_envs)
        ]
        for i in back:
            self._accumulators[i].load_state_dict(saved[i]["pending"])
        self.rollout.encode_observations()
        self._propose_here()
        for i in back:
            self.rollout.generators[i].set_state(saved[i]["rollout"]["generator"])  # drawing has moved it
            if self._candidates is not None:
                self._candidates.u[i] = saved[i]["candidates"]["u"]
                self._candidates.chunks[i] = saved[i]["candidates"]["chunks"]
        interrupted = [i for i in saved if saved[i]["rollout"]["trace"]["actions"] or self.vec.repeatable]
        return sum(i not in back for i in interrupted)
