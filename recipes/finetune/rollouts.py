"""Rollouts of a policy under its own noise, frame by frame, with an exact budget of environment steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.utils.constants import ACTION, OBS_PREFIX
from torch import Tensor

from trimtab.policies.acting import ChunkPolicy
from trimtab.rl.envs.chunk import ChunkResult, stack_observations
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.rollout import Rollout
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.progress import Progress


@dataclass
class RolloutEpisode:
    """A finished episode, step by step.

    Attributes:
        seed: its start.
        observations: what the policy's preprocessor takes at each step, by LeRobot's keys, (T, ...).
        actions: (T, action_dim), as a dataset for the policy holds them.
        rewards, successes: (T,) the environment's own.
        task: the language instruction.
    """

    seed: int
    observations: dict[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray
    successes: np.ndarray
    task: str

    @property
    def success(self) -> bool:
        return bool(self.successes.any())

    def frames(self) -> Iterator[dict[str, Any]]:
        """Its steps, as a LeRobotDataset takes them."""
        for step, action in enumerate(self.actions):
            yield {
                **{key: values[step] for key, values in self.observations.items()},
                ACTION: action,
                "next.reward": self.rewards[step : step + 1],
                "next.success": self.successes[step : step + 1],
                "next.done": np.array([step + 1 == len(self.actions)]),
                "task": self.task,
            }


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

    def __init__(self, runner: PolicyRunner, vec: ChunkVectorEnv, policy: ChunkPolicy, seed: int) -> None:
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
        return RolloutEpisode(
            seed=results[0].seed,
            observations={
                key: as_recorded(value)
                for key, value in self.runner.env_preprocessor(flat).items()
                if key.startswith(OBS_PREFIX) and isinstance(value, Tensor) and len(value) == len(seen)
            },
            actions=np.concatenate([actions for _, actions in chunks]).astype(np.float32),
            rewards=np.concatenate([result.rewards for result in results]).astype(np.float32),
            successes=np.concatenate([result.successes for result in results]).astype(bool),
            task=task,
        )


def as_recorded(value: Tensor) -> np.ndarray:
    """An observation (T, ...) as a dataset holds it: cameras as uint8 (T, H, W, C), all else as float32."""
    if value.ndim == 4:
        return (value * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return value.float().cpu().numpy()
