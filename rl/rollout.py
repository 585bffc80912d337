"""The one loop that steps environments chunk by chunk: for training, evaluation, rollouts and resuming."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.adapters import UserError
from trimtab.policies.acting import Choice, ChunkPolicy
from trimtab.rl.envs.base import VectorEnv
from trimtab.rl.envs.chunk import ChunkResult, RawObservation
from trimtab.rl.envs.contract import flat
from trimtab.rl.runner import Encoded, PolicyRunner, to_device


@dataclass
class Trace:
    """What it takes to come again to the middle of a running episode.

    Attributes:
        digests: hashes of the observations, from the first on.
        actions: of each executed chunk, as the environment got them.
        chunks: of each (steps, action_dim) normalised, where the policy remembers them.
    """

    digests: list[str] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    chunks: list[np.ndarray] = field(default_factory=list)


ATTEMPTS = 10  # episodes in a row that may fail to begin


class Rollout:
    """Runs episode after episode in each environment, a chunk at a time.

    ``encode_observations``, then ``begin``, which lets a policy act and sets the simulators going, then
    ``receive``, which waits for them. An environment whose episode ends goes on with the next one, until
    there is none.

    Args:
        runner, vec: the frozen policy, and environments.
        following: (environment, its episode) -> number of the episode after that, ``None`` where there is
            none. It is asked when the episode begins; with ``None``, for the first one.
        seed_of: the seed of an episode, by its number; by default that number.
        per_episode: noise is drawn from a generator for each episode, seeded by it; else from one for each
            environment, seeded by its first.
        render: seeds of first episodes to render.
        record: keep a trace of each running episode, so that a run can be resumed.

    Attributes:
        episode, upcoming: of each environment that runs one, and the one after it.
        observations, generators, traces: of each environment: what to act on next, of its noise, of its
            running episode.
        waiting: environments whose next episode begins once a person says so (``start``).
        envs, encoded, features: environments that ``encode_observations`` was asked for, and what it made.
        seconds: spent on the policy (``denoise``) and on waiting for simulators (``env_wait``); for which
            these worked (``env_busy``), and waited to be asked (``env_idle``).
    """

    def __init__(
        self,
        runner: PolicyRunner,
        vec: VectorEnv,
        following: Callable[[int, int | None], int | None],
        seed_of: Callable[[int], int] = int,
        per_episode: bool = True,
        render: Sequence[int] = (),
        record: bool = False,
    ) -> None:
        self.runner, self.vec, self.following, self.seed_of = runner, vec, following, seed_of
        self.per_episode, self.record = per_episode, record
        self.seconds = {"denoise": 0.0, "env_wait": 0.0, "env_busy": 0.0, "env_idle": 0.0}
        first = {i: following(i, None) for i in range(vec.num_envs)}
        self.upcoming = {i: episode for i, episode in first.items() if episode is not None}
        self.episode: dict[int, int] = {}
        self.generators = {i: torch.Generator().manual_seed(seed_of(k)) for i, k in self.upcoming.items()}
        self.observations: dict[int, RawObservation] = {}
        self.traces: dict[int, Trace] = {}
        self.waiting: list[int] = []
        if vec.attended:  # until then, what its observations look like
            self.waiting, self.episode = list(self.upcoming), dict(self.upcoming)
            self.traces = {i: Trace() for i in self.waiting}
            self.observations = {i: vec.descriptions[i].blank for i in self.waiting}
        else:
            self.restart(list(self.upcoming), render)

    def restart(self, envs: list[int], render: Sequence[int] = ()) -> None:
        """Begin the upcoming episodes of ``envs`` at once, or of one that cannot begin the one after it.

        Raises:
            UserError: one after the other cannot.
        """
        for _ in range(ATTEMPTS):
            for i in envs:
                self._enter(i)
            seeds = {i: self.seed_of(self.episode[i]) for i in envs if i in self.episode}
            if not seeds:
                return
            found = self.vec.reset(seeds, {i: seed in render for i, seed in seeds.items()})
            self.observations |= found
            for i in found:
                self._note(i)
            envs = [i for i in seeds if i not in found]
            self.upcoming |= {i: self.following(i, self.episode[i]) for i in envs}
        if envs:
            option, _, said = self.vec.not_begun[-1][1].partition(": ")
            raise UserError(option, f"{said}; so {ATTEMPTS} episodes in a row could not begin")

    def start(self) -> bool:
        """Wait until people have started the episodes that are ``waiting``; false if they end the run."""
        seeds = {i: self.seed_of(self.upcoming[i]) for i in self.waiting}
        self.observations |= (found := self.vec.reset(seeds))
        if len(found) < len(seeds):
            return False
        for i in self.waiting:
            self._enter(i)
            self._note(i)
        self.waiting = []
        return True

    def _enter(self, i: int) -> None:
        """Let the next episode be the one that runs."""
        self.runner.forget(i)
        episode = self.upcoming.pop(i)
        if episode is None:
            del self.episode[i]
            return
        self.episode[i] = episode
        self.traces[i] = Trace()
        if self.per_episode:
            self.generators[i] = torch.Generator().manual_seed(self.seed_of(episode))

    def _note(self, i: int) -> None:
        """Take up an observation, and of an episode that has just begun the one to follow."""
        if i not in self.upcoming:
            self.upcoming[i] = self.following(i, self.episode[i])
        if self.record:
            self.traces[i].digests.append(digest(self.observations[i]))

    def encode_observations(self, envs: list[int] | None = None, features: bool = True) -> None:
        """Encode the observations of ``envs``, by default of all that run an episode.

        With ``features``, make what a noise actor looks at, too.
        """
        self.envs = sorted(self.episode) if envs is None else envs
        self.encoded = self._encode(self.envs, self.observations)
        self.features: Tensor | None = self.runner.features(self.encoded) if features else None

    def _encode(self, envs: list[int], observations: dict[int, Any]) -> Encoded:
        tasks = [self.vec.task_descriptions[i] for i in envs]
        return self.runner.encode([observations[i] for i in envs], tasks, envs)

    def prior(self, draws: int, envs: list[int] | None = None) -> Tensor:
        """Noise draws (B, draws, *noise_shape) for ``envs``, by default for those looked at."""
        priors = [self.runner.prior(draws, self.generators[i]) for i in envs or self.envs]
        return to_device(torch.stack(priors), self.runner.adapter.device)

    def begin(self, policy: ChunkPolicy, limits: dict[int, int] | None = None) -> Choice:
        """Let ``policy`` act on what ``encode_observations`` encoded, and start stepping the chunks.

        ``limits`` are the most steps to execute, by environment.
        """
        started = time.perf_counter()
        prior = self.prior(policy.draws)
        choice, actions = self.runner.act(policy, self.encoded, self.features, prior, self.envs)
        if self.record and self.runner.adapter.remembers:
            for i, chunk, one in zip(self.envs, choice.chunk.float().cpu().numpy(), actions, strict=True):
                self.traces[i].chunks.append(chunk[: len(one)])
        self.seconds["denoise"] += time.perf_counter() - started
        sent = {i: a[: (limits or {}).get(i)] for i, a in zip(self.envs, actions, strict=True)}
        self._lengths = {i: len(one) for i, one in sent.items()}
        if self.record:
            for i, one in sent.items():
                self.traces[i].actions.append(np.array(one))
        started = time.perf_counter()  # without workers, sending is stepping
        upcoming = {i: self.upcoming[i] for i in sent}
        self.vec.send(sent, {i: None if k is None else self.seed_of(k) for i, k in upcoming.items()})
        self.seconds["env_wait"] += time.perf_counter() - started
        return choice

    def receive(self) -> dict[int, ChunkResult]:
        """Wait for the simulators: the result of each chunk that was sent."""
        started = time.perf_counter()
        self._results = self.vec.receive()
        self.seconds["env_wait"] += time.perf_counter() - started
        self.seconds["env_busy"] += self.vec.busy
        self.seconds["env_idle"] += self.vec.idle
        return self._results

    def final_observations(self) -> tuple[list[int], Encoded | None]:
        """Environments whose episode has ended in what ``receive`` brought, and the true last observations.

        To be asked before ``start_next_episodes``. A policy that remembers follows on from whole chunks only.
        Where the time limit cut the last one short, the critic sees the final observation as an episode's
        first: the nearest state that the policy can be in. (After a terminal state the value of what follows
        has no weight.)
        """
        ended = {i: result for i, result in self._results.items() if result.ended}
        if not ended:
            return [], None
        for i, result in ended.items():
            if result.steps < self._lengths[i]:
                self.runner.forget(i)
        finals = {i: result.final_observation for i, result in ended.items()}
        return list(ended), self._encode(list(ended), finals)

    def start_next_episodes(self) -> None:
        """Take up the observations that ``receive`` brought; where an episode has ended, the next one's."""
        passed = []
        for i, result in self._results.items():
            if (result.ended or result.lost) and self.vec.attended:
                if self.upcoming[i] is None:
                    self._enter(i)
                else:
                    self.waiting.append(i)
                    self.traces[i] = Trace()
                continue
            if result.ended or result.lost:
                self._enter(i)
            if i in self.episode and result.not_begun:
                self.upcoming[i] = self.following(i, self.episode[i])
                passed.append(i)
            elif i in self.episode:
                self.observations[i] = result.observation
                self._note(i)
        self.restart(passed)

    def state_dict(self) -> list[dict[str, Any]]:
        """Of each environment its episodes, its generator and its trace; the simulators are not in it."""
        return [
            {
                "episode": self.episode[i],
                "upcoming": self.upcoming[i],
                "generator": self.generators[i].get_state(),
                "trace": asdict(self.traces[i]),
            }
            for i in sorted(self.episode)
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> list[int]:
        """Put environments where they were: reset with the episode's seed, the same actions executed again.

        Every observation on the way must be the one that was seen then, to the bit; where one is not, the
        upcoming episode begins. Where the environments are known not to repeat (a robot above all), none is
        moved: they stay at the start of the episode that they have just begun. Returns those that are where
        they were.
        """
        begun = {i: saved for i, saved in enumerate(state) if saved["trace"]["digests"] or self.vec.attended}
        for i, saved in begun.items():
            self.upcoming[i] = saved["upcoming"]
            self.generators[i].set_state(saved["generator"])
        if not self.vec.repeatable or not begun:
            return []
        for i, saved in begun.items():
            self.episode[i], self.traces[i] = saved["episode"], Trace(**saved["trace"])
        lost = self._replay_episodes(list(begun))
        self.restart(sorted(lost))
        return [i for i in begun if i not in lost]

    def _replay_episodes(self, envs: list[int]) -> set[int]:
        """Execute the traces of ``envs`` from their seeds; returns those that did not go as they had gone."""
        runner, vec, traces = self.runner, self.vec, self.traces
        observations = vec.reset({i: self.seed_of(self.episode[i]) for i in envs})
        lost = {i for i in envs if i not in observations or digest(observations[i]) != traces[i].digests[0]}
        for i in envs:
            runner.forget(i)
        step = 0
        while going := [i for i in envs if i not in lost and step < len(traces[i].actions)]:
            for i in going if runner.adapter.remembers else ():
                encoded: Any = self._encode([i], observations)
                chunk = torch.as_tensor(traces[i].chunks[step]).unsqueeze(0)
                runner.remember(i, encoded[0], chunk.to(runner.adapter.device))
            vec.send({i: traces[i].actions[step] for i in going}, dict.fromkeys(going))
            for i, result in vec.receive().items():
                ended = result.ended or result.lost
                if ended or digest(result.observation) != traces[i].digests[step + 1]:
                    lost.add(i)
                observations[i] = result.observation
            step += 1
        self.observations |= observations
        return lost


def digest(observation: RawObservation) -> str:
    """A short hash of an observation history."""
    found = hashlib.blake2b(digest_size=16)
    for path, array in sorted(flat(observation).items()):
        found.update(f"{path}{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
