"""Collects transitions: the frozen policy acts on chosen noise, chunk by chunk, in many environments."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.policies.acting import Candidates, Choice, Denoise, noise_of
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.algorithms.acting import BehaviorPolicy
from trimtab.rl.data.decoder import ConditioningSpec
from trimtab.rl.data.memory import Row, observation_rows
from trimtab.rl.data.returns import NStepAccumulator, Returns, Transition
from trimtab.rl.envs.base import VectorEnv
from trimtab.rl.envs.chunk import ChunkResult
from trimtab.rl.rollout import Rollout
from trimtab.rl.runner import Encoded, PolicyRunner


@dataclass
class Episode:
    """A training episode, running or finished.

    Attributes:
        seed, task: its start, and its task's name where the environment has one.
        steered: whether the learner's policy acts in it, from start to end.
        success: whether the environment has reported success.
        steps, total: environment steps, and the undiscounted sum of the environment's own rewards.
        terminated: ended in a terminal state, not at the time limit.
        features, u: what was seen and chosen at each chunk, (chunks, d) and (chunks, dim); lists while it
            runs, like the rest.
        chunks: what was executed, (chunks, steps * action_dim), normalised; (chunks, 0) where the replay does
            not keep it.
        rewards, discounts: of each chunk.
        human, inverted: how many chunks a person executed, and of how many of them the noise was found.
        helped: whether a person has taken over in it: its success is not the policy's own.
    """

    seed: int
    task: str
    steered: bool
    success: bool = False
    steps: int = 0
    total: float = 0.0
    terminated: bool = False
    features: Any = field(default_factory=list)
    u: Any = field(default_factory=list)
    chunks: Any = field(default_factory=list)
    rewards: Any = field(default_factory=list)
    discounts: Any = field(default_factory=list)
    human: int = 0
    inverted: int = 0
    helped: bool = False


class Collector:
    """Makes transitions of what a learner does in all environments, a chunk at a time.

    ``begin`` lets the learner act and sets the simulators going; ``finish`` waits for them. What is done in
    between (learning) overlaps with the simulation. The noise of each environment comes from its own
    generator and its episodes from its own seeds, so a run repeats exactly.

    Args:
        runner, vec: the frozen policy, and environments.
        rl: the algorithm's config: discount, length of returns, candidates, and what the replay keeps.
        reward, reward_range: see ``returns.Returns``.
        seed: first of the training seeds; environment i takes seed + i, seed + i + num_envs, ...
        rank, processes: of a run in several; their episodes have different seeds.
        record: note what it takes to come back to the middle of the running episodes.
        assign: asked when an episode starts: whether what is learnt acts in it.

    Attributes:
        spec: of the conditioning, where the replay keeps that.
        lost: faults since the last ``finish``, which each lost an episode: kind, and what was said.
        reported: whether an environment has reported success or failure so far.
    """

    learner: BehaviorPolicy

    def __init__(
        self,
        runner: PolicyRunner,
        vec: VectorEnv,
        rl: AlgorithmConfig,
        reward: str,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        record: bool = False,
        assign: Callable[[], bool] = lambda: True,
        reward_range: tuple[float, float] | None = None,
    ) -> None:
        self.runner, self.vec, self.rl, self.assign = runner, vec, rl, assign
        self.returns = Returns(
            reward,
            rl.gamma,
            rl.discount_per,
            runner.adapter.chunk_shape[0],
            rl.bootstrap_at_time_limit,
            reward_range,
        )
        self.lost: list[tuple[str, str]] = []
        self.reported = False
        self.env_steps = 0
        self._steering = False
        envs, self.stride = range(vec.num_envs), vec.num_envs * processes
        self.first_seed = first = seed + rank * vec.num_envs
        self.rollout = Rollout(
            runner,
            vec,
            lambda i, seed: first + i if seed is None else seed + self.stride,
            per_episode=False,
            record=record,
        )
        self.rollout.encode_observations()
        self._accumulators = [NStepAccumulator(rl.n_step) for _ in envs]
        self._human = [False for _ in envs]  # whether a person has the robot
        # Of running episodes, to be inverted at their ends: what a person saw and did, u and its mark.
        self._taken: list[list[tuple[Any, ...]]] = [[] for _ in envs]
        self._held: list[list[Transition]] = [[] for _ in envs]  # of running episodes
        self._episodes = [self._new_episode(i) for i in envs]
        keeps = "conditioning" in rl.replayed
        self.spec = ConditioningSpec.of(runner.adapter, self.rollout.encoded) if keeps else None

    def start(self, learner: BehaviorPolicy) -> None:
        """Let ``learner`` act from here on."""
        self.learner = learner
        self._look_here()

    def _new_episode(self, i: int) -> Episode:
        return Episode(self.rollout.episode[i], self.vec.task_names[i], self.assign())

    def start_episodes(self) -> bool:
        """Wait for the people who start the episodes that wait for them; false if they end the run."""
        waiting = list(self.rollout.waiting)
        if not self.rollout.start():
            return False
        for i in waiting:
            self._episodes[i], self._human[i] = self._new_episode(i), False
        self._look_here()
        return True

    def _look_here(self) -> None:
        rollout = self.rollout
        if rollout.waiting:  # there is nothing to see yet
            self._candidates = None
            self._rows: list[Row] = [(np.zeros(0), {}) for _ in self._episodes]
            return
        rollout.encode_observations()
        self._candidates, self._rows = self._look(rollout.encoded, rollout.features, rollout.envs)

    def _look(
        self, encoded: Encoded, features: Tensor, envs: list[int]
    ) -> tuple[Candidates | None, list[Row]]:
        """Candidates of each observation, where the algorithm learns from them, and what the replay keeps."""
        candidates = None
        if self.rl.candidates:
            prior, denoise = (
                self.rollout.prior(self.rl.candidates, envs),
                partial(self.runner.denoise, encoded),
            )
            candidates = self.learner.propose(features, prior, denoise, self._steering)
        return candidates, observation_rows(features, candidates, encoded, self.spec)

    def begin(self, steering: bool = True) -> None:
        """Let the learner act, and start stepping the chunks.

        Without ``steering`` the untrained policy acts everywhere, else only in episodes that are not steered.
        """
        self._steering = steering
        choice = self.rollout.begin(self)
        self._u = np.array(choice.u.float().cpu())  # copies: a robot may have executed something else
        self._marks = np.zeros((len(self._u), 1), dtype=np.float32)
        self._chunks = np.array(choice.chunk.float().flatten(1).cpu())
        self.vec.note(u=self._u[0], steered=np.array(steering and self._episodes[0].steered))

    @property
    def draws(self) -> int:
        """Of the ``ChunkPolicy`` that acts."""
        return self.learner.draws

    def act(self, features: Tensor, prior: Tensor, denoise: Denoise) -> Choice:
        """What the learner does in the episodes that run now, as a ``ChunkPolicy``."""
        steered = torch.tensor([self._steering and episode.steered for episode in self._episodes])
        return self.learner.act(features, prior, denoise, self._candidates, steered)

    def finish(self) -> tuple[list[Transition], list[Episode]]:
        """Wait for the simulators and return the transitions and episodes that are now complete."""
        rollout, seen = self.rollout, dict(self.rollout.observations)
        results = rollout.receive()
        started = time.perf_counter()
        for i, result in results.items():
            if result.executed is not None and not result.lost:
                self._take_executed(i, result, seen[i])
        ended, encoded = rollout.final_observations()
        finals = self._look(encoded, self.runner.features(encoded), ended)[1] if encoded is not None else []
        rollout.start_next_episodes()
        self.lost, self.vec.not_begun = [*self.lost, *self.vec.not_begun], []
        before = self._rows
        self._look_here()
        after = list(self._rows)  # where an episode waits, not to be used
        for i, row in zip(ended, finals, strict=True):
            after[i] = row
        transitions: list[Transition] = []
        episodes: list[Episode] = []
        for i, result in results.items():
            if result.lost:
                self.lost.append(result.lost)
                for pending in (self._accumulators[i], self._held[i], self._taken[i]):
                    pending.clear()
            else:
                self._held[i] += self._add(i, result, before[i], after[i])
                self.env_steps += result.steps
            if result.ended or not self.vec.attended:  # a person may still drop a robot's
                transitions += self._held[i]
                self._held[i] = []
            if result.ended:
                self._invert(i)
                episodes.append(self._episodes[i])
            if (result.ended or result.lost) and not self.vec.attended:
                self._episodes[i] = self._new_episode(i)
        for episode in episodes:
            for name in ("features", "u", "chunks", "rewards", "discounts"):
                setattr(episode, name, np.asarray(getattr(episode, name)))
        rollout.seconds["denoise"] += time.perf_counter() - started
        return transitions, episodes

    def _take_executed(self, i: int, result: ChunkResult, seen: Any) -> None:
        """What a robot was really sent, and by whom, in the place of what was chosen."""
        steps, dim = self.runner.adapter.chunk_shape
        actions = np.asarray(result.executed)
        if result.human:  # as demonstrations: past the end the last repeats
            actions = actions[np.minimum(np.arange(steps), len(actions) - 1)]
        history = self.runner.history([seen], [self.vec.task_descriptions[i]])
        chunk = self._chunks[i].reshape(-1, dim).copy()
        chunk[: len(actions)] = self.runner.normalised(history, torch.from_numpy(actions)[None])[0].numpy()
        self._chunks[i] = chunk.reshape(-1)
        self._u[i] = 0.0 if result.human else result.note.get("u", self._u[i])
        if result.human and "imitated" in self.rl.replayed:
            encoded = self.rollout.encoded[self.rollout.envs.index(i)]
            self._taken[i].append((encoded, chunk, self._u[i], self._marks[i]))

    def _invert(self, i: int) -> None:
        """Note the noises of what a person did in an episode, where these can be told.

        It takes time that an arm in a person's hands does not have, so at the episode's end.
        """
        for encoded, chunk, u, mark in self._taken[i]:
            found = noise_of(self.runner.adapter, self.learner.space, encoded, torch.from_numpy(chunk)[None])
            self._episodes[i].human += 1
            if found is not None:  # in the place that the transitions, too, refer to
                u[:], mark[:] = found.float().cpu().numpy(), 1.0
                self._episodes[i].inverted += 1
        self._taken[i].clear()

    def _add(self, i: int, result: ChunkResult, before: Row, after: Row) -> list[Transition]:
        """Take an executed chunk into the running episode; returns the transitions that it completes."""
        episode, (features, kept), (next_features, next_kept) = self._episodes[i], before, after
        episode.success |= bool(result.successes.any())
        reward, discount = self.returns.reward_and_discount(result, episode.success)
        episode.features.append(features)
        episode.u.append(self._u[i])
        # Where nothing judges chunks, they are left out: some policies' differ in length.
        episode.chunks.append(self._chunks[i] if "chunk" in self.rl.replayed else self._chunks[i, :0])
        episode.rewards.append(reward)
        episode.discounts.append(discount)
        episode.steps += result.steps
        episode.total += float(result.rewards.sum())
        episode.terminated = result.terminated
        episode.helped |= result.human
        self.reported |= result.success_key is not None or episode.success
        kept |= {"chunk": self._chunks[i], "imitated": self._marks[i]}
        chunk = Transition(features, self._u[i], reward, discount, next_features, kept)
        done = []
        if result.human != self._human[i]:  # no return goes on where another acts
            done, self._human[i] = self._accumulators[i].flush(), result.human
        if result.human and "chunk" not in self.rl.replayed:  # nobody knows what noise would have said that
            return done
        return done + self._accumulators[i].add(chunk, result.ended, next_kept)

    def state_dict(self) -> dict[str, Any]:
        """All but the simulators, environment by environment, between two chunks."""
        drawn = self._candidates
        envs = [
            {
                "pending": self._accumulators[i].state_dict(),
                "running": vars(self._episodes[i]),
                "candidates": None if drawn is None else {"u": drawn.u[i], "chunks": drawn.chunks[i]},
                "rollout": state,
            }
            for i, state in enumerate(self.rollout.state_dict())
        ]
        beside = {
            "env_steps": self.env_steps,
            "seconds": dict(self.rollout.seconds),
            "steering": self._steering,
        }
        return beside | {"envs": envs}

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """Put a new collector where it was, as far as its environments repeat their episodes.

        Returns how many running episodes could not be repeated and were dropped.
        """
        rollout, saved, self.env_steps = self.rollout, state["envs"], state["env_steps"]
        rollout.seconds.update(state["seconds"])
        self._steering = state["steering"]
        back = rollout.load_state_dict([one["rollout"] for one in saved])
        for i in range(self.vec.num_envs):
            if i in back:
                self._episodes[i] = Episode(**saved[i]["running"])
                self._accumulators[i].load_state_dict(saved[i]["pending"])
            elif not self.vec.attended:
                self._episodes[i] = self._new_episode(i)
        self._look_here()
        for i in back:
            rollout.generators[i].set_state(saved[i]["rollout"]["generator"])  # drawing has moved it
            if self._candidates is not None:
                self._candidates.u[i] = saved[i]["candidates"]["u"]
                self._candidates.chunks[i] = saved[i]["candidates"]["chunks"]
        if back:
            self._rows = observation_rows(rollout.features, self._candidates, rollout.encoded, self.spec)
        traces = [one["rollout"]["trace"] for one in saved]
        # Without digests nothing had begun: it had learnt from demonstrations alone.
        interrupted = [one["actions"] or (self.vec.repeatable and one["digests"]) for one in traces]
        return sum(bool(began) and i not in back for i, began in enumerate(interrupted))

    def skip(self, seed: int) -> None:
        """Begin new episodes, none of a seed below ``seed``."""
        rollout, stride = self.rollout, self.stride
        first = self.first_seed + -(-(seed - self.first_seed) // stride) * stride
        rollout.upcoming = {i: first + i for i in range(self.vec.num_envs)}
        if not self.vec.repeatable:  # a robot's has just begun
            return
        for i, upcoming in rollout.upcoming.items():
            rollout.generators[i].manual_seed(upcoming)
        rollout.restart(list(rollout.upcoming))
        self._episodes = [self._new_episode(i) for i in range(self.vec.num_envs)]
        self._look_here()
