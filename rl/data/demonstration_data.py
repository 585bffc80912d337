"""What demonstrations are made of: a LeRobotDataset's frames, cut into episodes and executed chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.adapters import PolicyAdapter, UserError
from trimtab.adapters.errors import at_least
from trimtab.adapters.inputs import required_inputs
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.data.opening import open_dataset
from trimtab.rl.envs.chunk import ChunkResult

OPTION = "--demos.repo_id"
SCHEDULES = ("constant", "linear")
SPARSE = ((0.0, 1.0), (-1.0, 0.0))  # reward without success, and with
GUESS = "every episode's end, a guess"
SUCCESS = ("auto", "column", "reward", "end")


@dataclass
class DemosConfig:
    """``--demos.*``: a LeRobotDataset that joins the replay."""

    # Its name on the Hub, or any name where root is given. Without both there are no demonstrations.
    repo_id: str | None = None
    # Its folder on this machine.
    root: str | None = None
    revision: str | None = None
    # Indices of the episodes to take; default: those of the environment's task, if any has its name.
    episodes: list[int] | None = None
    # Share of each batch that is drawn from the demonstrations.
    share: float = 0.5
    # constant, or linear: the share falls to 0 over the run.
    schedule: str = "constant"
    # Which step succeeds: column (next.success), reward (next.reward reaches reward_threshold), end (the last
    # of every episode), or auto: column where there is one, else the reward where it is 0 until success and
    # then 1 (or -1 and then 0), else end.
    success: str = "auto"
    reward_threshold: float = 1.0
    # States that the policy looks at together.
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise UserError("--demos.share", f"is a share above 0 and at most 1, got {self.share}")
        at_least(1, self, "--demos.", "batch_size")
        for name, known in (("schedule", SCHEDULES), ("success", SUCCESS)):
            if getattr(self, name) not in known:
                raise UserError(f"--demos.{name}", f"'{getattr(self, name)}' is none of {', '.join(known)}")

    @property
    def enabled(self) -> bool:
        return bool(self.repo_id or self.root)

    def check(self, rl: AlgorithmConfig) -> None:
        """Raise a UserError where the algorithm cannot learn from demonstrations."""
        if self.enabled and "chunk" not in rl.replayed:
            raise UserError(
                OPTION,
                f"{rl.type} cannot learn from demonstrations, which do not tell the noise that was fed; use "
                "best_of_n, dsrl_na or residual",
            )


@dataclass
class Demonstration:
    """One recorded episode.

    A success ends it, as it ends an episode of a run. Where none comes, what follows the last action is not
    recorded: the last frame then is the final observation, and its action is left out. Nor is recorded
    whether the episode had failed or its time was up (``next.done`` is true in both), so it ends as both.

    Attributes:
        first: row of its first frame.
        rewards, successes: of each step that counts, (T,).
        succeeded: whether the last of these steps succeeds.
        frames: rows that belong to it.
    """

    first: int
    rewards: np.ndarray
    successes: np.ndarray
    succeeded: bool
    frames: int

    @staticmethod
    def of(first: int, rewards: np.ndarray, successes: np.ndarray) -> Demonstration:
        """Cut the recorded steps to those that count."""
        succeeded, frames = bool(successes.any()), len(successes)
        length = int(successes.argmax()) + 1 if succeeded else frames - 1
        return Demonstration(first, rewards[:length], successes[:length], succeeded, frames)

    @property
    def final(self) -> int:
        """Row of the final observation; of a success, the nearest one: the value there has no weight."""
        return self.first + min(len(self.rewards), self.frames - 1)

    def states(self, steps: int) -> list[int]:
        """Rows that the policy looks at: the starts of chunks of ``steps``, and the final observation."""
        starts = list(range(self.first, self.first + len(self.rewards), steps))
        return starts if not starts or starts[-1] == self.final else [*starts, self.final]

    def chunks(self, steps: int) -> Iterator[tuple[int, ChunkResult, int]]:
        """(row, what came of the chunk, row of what follows) of each executed chunk."""
        end = self.first + len(self.rewards)
        for row in range(self.first, end, steps):
            part, last = slice(row - self.first, row - self.first + steps), row + steps >= end
            rewards, successes = self.rewards[part], self.successes[part]
            truncated = last and not self.succeeded
            result = ChunkResult(
                None, None, rewards, successes, terminated=last, truncated=truncated, seed=-1
            )
            yield row, result, self.final if last else row + steps


@dataclass
class DemonstrationData:
    """A LeRobotDataset, ready to be looked at.

    Attributes:
        dataset: LeRobot's.
        episodes: those that take part.
        keys: observations that the policy takes.
        n_obs_steps: length of its observation history.
        notes: lines to show the user.
        rule: how success was told.
    """

    dataset: Any
    episodes: list[Demonstration]
    keys: list[str]
    n_obs_steps: int
    notes: list[str] = field(default_factory=list)
    rule: str = ""

    def __post_init__(self) -> None:
        actions = _column(self.dataset, "action").astype(np.float32)
        self._actions = actions.reshape(len(actions), -1)  # LeRobot stores vectors of length 1 as numbers
        self._first = np.zeros(len(self._actions), dtype=np.int64)  # of each row, of its episode,
        self._last = np.zeros(len(self._actions), dtype=np.int64)  # the first row and the last step's
        for episode in self.episodes:
            rows = slice(episode.first, episode.first + episode.frames)
            self._first[rows] = episode.first
            self._last[rows] = episode.first + max(len(episode.rewards) - 1, 0)

    def summary(self, transitions: int, env_fps: float | None) -> list[str]:
        """Lines about the ``transitions`` that join the replay of an environment of ``env_fps``."""
        won = sum(episode.succeeded for episode in self.episodes)
        count = f"demonstrations: {len(self.episodes)} episodes, {won} succeed; {transitions} transitions; "
        told = f"success told by {self.rule}" + ("" if won else " (else: --demos.success=end)")
        return [*self.notes, count + told, *rate_warning(self.dataset, env_fps)]

    def actions(self, row: int, steps: int) -> np.ndarray:
        """(steps, action_dim) executed from ``row``, as recorded; past the episode's end the last repeats."""
        return self._actions[np.minimum(np.arange(row, row + steps), self._last[row])]

    def history(self, rows: list[int]) -> dict[str, Any]:
        """What ``adapter.observe`` takes, for the frames ``rows`` and those before: (B, n_obs_steps, ...).

        Before an episode's first frame that one repeats, as it does when a run starts.
        """
        back = np.arange(self.n_obs_steps - 1, -1, -1)
        wanted = np.maximum(np.asarray(rows)[:, None] - back, self._first[rows][:, None])
        frames = {int(row): self.dataset[int(row)] for row in np.unique(wanted)}
        batch: dict[str, Any] = {}
        for key in self.keys:
            values = torch.stack([frames[int(row)][key] for row in wanted.ravel()])
            values = values.unsqueeze(1) if values.ndim == 1 else values
            batch[key] = values.unflatten(0, wanted.shape)
        batch["task"] = [frames[row]["task"] for row in rows]
        return batch


def _opened(config: DemosConfig) -> Any:
    """The LeRobotDataset that a ``DemosConfig`` names.

    Raises:
        UserError: it is not there, is broken, or has no such episodes.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = Path(config.root).expanduser() if config.root else None
    name = config.repo_id or f"local/{root.resolve().name}"
    make = partial(LeRobotDataset, name, root=root, revision=config.revision)
    dataset = open_dataset("--demos", name, config.root, make)
    if config.episodes is None:
        return dataset
    total = dataset.meta.total_episodes
    if wrong := [index for index in config.episodes if not 0 <= index < total]:
        raise UserError("--demos.episodes", f"the dataset has episodes 0 to {total - 1}, got {wrong[0]}")
    return open_dataset("--demos", name, config.root, partial(make, episodes=sorted(set(config.episodes))))


def read_demonstrations(
    config: DemosConfig, adapter: PolicyAdapter, reward: str, task: str
) -> DemonstrationData:
    """Open the dataset of a ``DemosConfig``, check that it fits the policy, and cut it into episodes.

    Args:
        config: the demonstrations' config.
        adapter: the policy; its saved preprocessor is what the observations will go through.
        reward: ``env`` needs the column ``next.reward``.
        task: the environment's instruction; unless episodes are named, only those of this task take part,
            where there are any.

    Raises:
        UserError: the dataset does not fit.
    """
    dataset = _opened(config)
    features, notes = dataset.features, []
    names = {adapter.renames().get(key, key): key for key in features if key.startswith("observation")}
    required = required_inputs(adapter, names)
    missing = [key for key in required if key not in names]
    if missing or "action" not in features:
        raise UserError(
            OPTION,
            f"the policy needs {', '.join(missing or ['action'])}, the dataset has {', '.join(features)}",
        )
    width = features["action"]["shape"][-1]
    if width != adapter.chunk_shape[1]:
        raise UserError(OPTION, f"its actions have {width} numbers, the policy's {adapter.chunk_shape[1]}")
    if reward == "env" and "next.reward" not in features:
        raise UserError("--train.reward", "env needs the column next.reward, which the dataset lacks")
    successes, rule = _successes(dataset, config)
    if rule == GUESS:
        other = "" if "next.reward" not in features else ", and next.reward tells more than success"
        notes.append(
            f"demonstrations: the dataset has no next.success{other}, so every episode's end counts as "
            "success (--demos.success)"
        )
    index = _column(dataset, "episode_index").reshape(-1)
    rewards = (
        _column(dataset, "next.reward").reshape(-1).astype(np.float64)
        if reward == "env"
        else np.zeros(len(index))
    )
    firsts = np.flatnonzero(np.diff(index, prepend=index[:1] - 1))
    spans = list(zip(firsts, [*firsts[1:], len(index)], strict=True))
    if config.episodes is None:
        tasks = [str(name) for name in dataset.meta.tasks.index]
        ours = _column(dataset, "task_index").reshape(-1)[firsts]
        same = [span for span, number in zip(spans, ours, strict=True) if tasks[int(number)] == task]
        if same and len(same) < len(spans):
            notes.append(f"demonstrations: {len(same)} of {len(spans)} episodes are of the task '{task}'")
        elif not same:
            why = f"no episode is of the task '{task}'" if task else "the environment names no task"
            notes.append(f"demonstrations: {why}; all {len(spans)} take part")
        spans = same or spans
    episodes = [Demonstration.of(int(a), rewards[a:b], successes[a:b]) for a, b in spans]
    episodes = [episode for episode in episodes if len(episode.rewards)]
    if not episodes:
        raise UserError(OPTION, "no episode of the dataset has a step to learn from")
    keys = [names[key] for key in required]
    return DemonstrationData(dataset, episodes, keys, adapter.n_obs_steps, notes, rule)


def _successes(dataset: Any, config: DemosConfig) -> tuple[np.ndarray, str]:
    """(N,) whether each recorded step succeeds, and how that was told."""
    kind, index = config.success, _column(dataset, "episode_index").reshape(-1)
    if kind == "auto" and "next.success" in dataset.features:
        kind = "column"
    if kind == "auto" and "next.reward" in dataset.features:
        rewards = _column(dataset, "next.reward").reshape(-1)
        level = sparse_level(rewards, np.diff(index, prepend=index[:1] - 1) != 0)
        if level is not None:
            return rewards >= level, f"next.reward, which is {level - 1:g} without success and {level:g} with"
    column = {"column": "next.success", "reward": "next.reward"}.get(kind)
    if column and column not in dataset.features:
        raise UserError("--demos.success", f"the dataset has no column {column}")
    if column == "next.success":
        return _column(dataset, column).reshape(-1) > 0, column
    if column == "next.reward":
        threshold = config.reward_threshold
        return _column(dataset, column).reshape(-1) >= threshold, f"{column} of {threshold:g} or more"
    return np.diff(index, append=index[-1:] + 1) != 0, GUESS if kind == "auto" else "every episode's end"


def sparse_level(rewards: np.ndarray, firsts: np.ndarray) -> float | None:
    """The reward that says success, where it says nothing else; ``None`` of any other reward.

    HIL-SERL's recordings have 0 without success and 1 with, goal-conditioned environments -1 and 0. Where all
    episodes begin at the higher one, it pays for each step survived.

    Args:
        rewards: (N,) of each recorded step.
        firsts: (N,) whether it is its episode's first.
    """
    for low, high in SPARSE:
        won = rewards == high
        if (won | (rewards == low)).all() and not won[firsts].all():
            return high
    return None


def rate_warning(dataset: Any, env_fps: float | None) -> list[str]:
    """A line where a LeRobotDataset was recorded at another rate than the environment's ``env_fps``."""
    if env_fps is None or float(dataset.fps) == float(env_fps):
        return []
    return [
        f"warning: the dataset has {dataset.fps:g} frames a second, the environment {env_fps:g} (--env.fps): "
        "its chunks last another time than those that are executed"
    ]


def _column(dataset: Any, name: str) -> np.ndarray:
    return np.asarray(dataset.hf_dataset.with_format("numpy")[name][:])
