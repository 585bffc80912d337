"""Filtered behaviour cloning, the baseline of all steering: the base fine-tuned on its own successes."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lerobot.configs.default import DatasetConfig
from lerobot.utils.constants import ACTION, OBS_PREFIX
from torch import Tensor

from trimtab.policies.acting import ChunkPolicy
from trimtab.recipes.finetune.data import REPO_ID, Recorder
from trimtab.recipes.finetune.training import FineTuner
from trimtab.rl.envs.base import VectorEnv
from trimtab.rl.envs.chunk import ChunkResult, stack_observations
from trimtab.rl.rollout import Rollout
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.progress import Progress

ROUND_STEPS = 800  # gradient steps of a round by default


@dataclass
class RolloutEpisode:
    """A finished episode: the seed of its start, and its steps as a LeRobotDataset takes them."""

    seed: int
    frames: list[dict[str, Any]]

    @cached_property
    def success(self) -> bool:
        return any(frame["next.success"].item() for frame in self.frames)


class Rollouts:
    """Episodes of one policy in many environments, collected in instalments.

    An instalment ends after an exact number of environment steps. Episodes that it leaves unfinished go on in
    the next. Each episode's noise comes from a generator of its own, seeded by its seed.

    Args:
        runner: the policy; its weights may change between instalments.
        vec: environments that return every step's observation (``keep_seen``).
        policy: acts, without a look at features.
        seed: first of the seeds; environment i takes seed + i, seed + i + num_envs, ... (as in steering).
    """

    def __init__(self, runner: PolicyRunner, vec: VectorEnv, policy: ChunkPolicy, seed: int) -> None:
        self.runner, self.vec, self.policy = runner, vec, policy
        self.env_steps = 0
        count = vec.num_envs
        self._rollout = Rollout(runner, vec, lambda i, k: seed + i if k is None else k + count)
        # Of each running episode the chunks so far, and their actions as a dataset holds them.
        self._chunks: list[list[tuple[ChunkResult, np.ndarray]]] = [[] for _ in range(count)]

    def collect(self, steps: int, label: str = "rollouts", progress: bool = True) -> list[RolloutEpisode]:
        """Take exactly ``steps`` environment steps; return the episodes that ended, in order."""
        goal = self.env_steps + steps
        finished: list[RolloutEpisode] = []
        bar = Progress(total=steps, desc=label, unit="step", disable=not progress, leave=False)
        while self.env_steps < goal:
            finished += self._step(goal - self.env_steps)
            bar.update(steps - (goal - self.env_steps) - bar.n)
            if finished:
                rate = np.mean([episode.success for episode in finished])
                bar.set_postfix_str(f"success {rate:.2f} of {len(finished)}")
        bar.close()
        return finished

    def _step(self, limit: int) -> list[RolloutEpisode]:
        """One chunk in as many environments as ``limit`` steps allow; the last one's may be cut short."""
        length, rollout = self.runner.adapter.chunk_shape[0], self._rollout
        quota = {i: min(length, limit - i * length) for i in range(self.vec.num_envs) if limit > i * length}
        rollout.encode_observations(list(quota), features=False)
        choice = rollout.begin(self.policy, quota)
        encoded: Any = rollout.encoded
        recorded = self.runner.adapter.postprocess(choice.chunk, encoded).float().cpu().numpy()
        finished = []
        for actions, (i, result) in zip(recorded, rollout.receive().items(), strict=True):
            self.env_steps += result.steps
            self._chunks[i].append((result, actions[: result.steps]))
            if result.ended:
                finished.append(self._episode(self._chunks[i], self.vec.task_descriptions[i]))
                self._chunks[i] = []
        rollout.start_next_episodes()
        return finished

    def _episode(self, chunks: list[tuple[ChunkResult, np.ndarray]], task: str) -> RolloutEpisode:
        from lerobot.envs.utils import preprocess_observation

        results = [result for result, _ in chunks]
        seen = [observation for result in results for observation in result.seen]
        flat = {**preprocess_observation(stack_observations(seen)), "task": [task] * len(seen)}
        columns = {
            key: as_recorded(value)
            for key, value in self.runner.env_preprocessor(flat).items()
            if key.startswith(OBS_PREFIX) and isinstance(value, Tensor) and len(value) == len(seen)
        }
        rewards = np.concatenate([result.rewards for result in results]).astype(np.float32)
        successes = np.concatenate([result.successes for result in results]).astype(bool)
        columns |= {
            ACTION: np.concatenate([actions for _, actions in chunks]).astype(np.float32),
            "next.reward": rewards[:, None],
            "next.success": successes[:, None],
            "next.done": np.arange(1, len(seen) + 1)[:, None] == len(seen),
        }
        frames = [dict(zip(columns, row)) | {"task": task} for row in zip(*columns.values(), strict=True)]
        return RolloutEpisode(results[0].seed, frames)


def as_recorded(value: Tensor) -> np.ndarray:
    """An observation (T, ...) as a dataset holds it: cameras as uint8 (T, H, W, C), all else as float32."""
    if value.ndim == 4:
        return (value * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return value.float().cpu().numpy()


@dataclass
class Round:
    """What a round did, and what its parts took."""

    number: int
    episodes: list[RolloutEpisode]
    # None where no episode succeeded, for nothing new is to be learnt.
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def successes(self) -> int:
        return sum(episode.success for episode in self.episodes)


def rounds(
    tuner: FineTuner,
    rollouts: Rollouts,
    recorder: Recorder,
    env_steps: int,
    count: int,
    seed: int,
) -> Iterator[Round]:
    """Rounds of rolling out and of fine-tuning on all successes so far.

    Args:
        tuner: trains; ``rollouts`` act through its adapter, ``recorder`` keeps the successes.
        env_steps: of all ``count`` rounds together, which share them evenly.
        seed: round r fine-tunes with the seed ``seed + r``.
    """
    for number in range(1, count + 1):
        label, marks = f"round {number}/{count}", [time.perf_counter()]
        share = env_steps * number // count - rollouts.env_steps
        this = Round(number, rollouts.collect(share, f"{label}: rollouts"))
        marks.append(time.perf_counter())
        if successes := [episode for episode in this.episodes if episode.success]:
            recorder.add(episode.frames for episode in successes)
            marks.append(time.perf_counter())
            data = DatasetConfig(REPO_ID, root=str(recorder.root))
            this.losses = tuner.fit(data, seed + number, f"{label}: fine-tuning", ROUND_STEPS)
            marks.append(time.perf_counter())
        parts = ("rollouts", "recording", "training")
        this.seconds = {name: end - start for name, start, end in zip(parts, marks, marks[1:])}
        yield this
