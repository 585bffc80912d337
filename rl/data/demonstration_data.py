"""What demonstrations are made of: a LeRobotDataset's frames, cut into episodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.adapters import PolicyAdapter, UserError
from trimtab.adapters.errors import at_least, reason
from trimtab.adapters.inputs import required_inputs
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.envs.contract import SUCCESS_KEYS

OPTION = "--demos.repo_id"
SCHEDULES = ("constant", "linear")
SUCCESS_COLUMNS = ("next.success", *(f"next.{key}" for key in SUCCESS_KEYS), *SUCCESS_KEYS)
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
    # of every episode), or auto: column where there is one, else the reward where it has two values (0 until
    # success and then 1), else end.
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
    """

    first: int  # row of its first frame
    final: int  # of the final observation; if a success came in the last frame, that: its value has no weight
    actions: np.ndarray  # (T, action_dim) of the steps that count
    rewards: np.ndarray  # (T,)
    successes: np.ndarray  # (T,)

    @staticmethod
    def of(first: int, actions: np.ndarray, rewards: np.ndarray, successes: np.ndarray) -> Demonstration:
        """Cut the recorded steps to those that count."""
        last = len(successes) - 1
        end = int(successes.argmax()) + 1 if successes.any() else last
        final = first + min(end, last)
        return Demonstration(first, final, actions[:end], rewards[:end], successes[:end])

    @property
    def succeeded(self) -> bool:
        return bool(self.successes.any())

    def starts(self, steps: int) -> list[int]:
        """Rows at which chunks of ``steps`` begin."""
        return list(range(self.first, self.first + len(self.rewards), steps))

    def chunk(self, row: int, steps: int) -> np.ndarray:
        """(steps, action_dim) executed from ``row``, as recorded; past the episode's end the last repeats."""
        start = row - self.first
        return self.actions[np.minimum(np.arange(start, start + steps), len(self.actions) - 1)]


@dataclass
class DemonstrationData:
    """A LeRobotDataset, ready to be looked at."""

    config: DemosConfig
    dataset: Any  # LeRobot's, whose items hold the policy's observation history
    episodes: list[Demonstration]  # those that take part
    keys: list[str]  # observations that the policy takes
    notes: list[str]  # to show the user
    rule: str  # how success was told

    def reward_range(self, steps: int) -> tuple[float, float]:
        """Smallest and largest reward, each the mean of a chunk's ``steps``."""
        means = [
            float(episode.rewards[start : start + steps].mean())
            for episode in self.episodes
            for start in range(0, len(episode.rewards), steps)
        ]
        return min(means), max(means)

    def summary(self, transitions: int, env_fps: float | None) -> list[str]:
        """Lines about the ``transitions`` that join the replay of an environment of ``env_fps``."""
        won = sum(episode.succeeded for episode in self.episodes)
        count = f"demonstrations: {len(self.episodes)} episodes, {won} succeed; {transitions} transitions; "
        told = f"success told by {self.rule}" + ("" if won else " (else: --demos.success=end)")
        return [*self.notes, count + told, *rate_warning(self.dataset, env_fps)]

    def history(self, rows: list[int]) -> dict[str, Any]:
        """What ``adapter.observe`` takes, for the frames ``rows`` and those before: (B, n_obs_steps, ...)."""
        items = [self.dataset[row] for row in rows]
        batch: dict[str, Any] = {}
        for key in self.keys:
            values = torch.stack([item[key] for item in items])
            batch[key] = values.unsqueeze(-1) if values.ndim == 2 else values
        batch["task"] = [item["task"] for item in items]
        return batch


def open_dataset(group: str, name: str | None, root: str | Path | None, make: Callable[[], Any]) -> Any:
    """What ``make`` opens: the dataset that the options ``GROUP.repo_id`` and ``GROUP.root`` name.

    Raises:
        UserError: it is not there, or is broken.
    """
    option = f"{group}.root" if root else f"{group}.repo_id"
    if root and not Path(root).expanduser().is_dir():
        raise UserError(option, f"there is no folder {root}")
    try:
        return make()
    except Exception as error:  # LeRobot, datasets and the Hub have their own for each way to fail
        raise unreadable(option, name, root, error) from error


def unreadable(option: str, name: str | None, root: str | Path | None, error: Exception) -> UserError:
    """The line about a dataset that cannot be opened, with the command that mends it, if LeRobot says one."""
    folder = Path(root).expanduser() if root else None
    if folder and not (folder / "meta" / "info.json").is_file():  # LeRobot then asks the Hub
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        why = f"it has no meta/info.json; it holds {held or 'nothing'}"
    elif folder and (older := _older_format(folder / "meta" / "info.json")):
        why = older
    else:
        why = reason(error)
        lines = [line.strip() for line in str(error).splitlines()]
        for at, line in enumerate(lines):
            if line.startswith("python -m "):  # up to the command; its own is for a dataset on the Hub
                where = f" --root={folder} --push-to-hub=false" if folder else ""
                why = " ".join(said for said in (*lines[:at], line + where) if said.strip("`"))
                break
    return UserError(option, f"cannot read {root or name} as a LeRobotDataset: {why}")


def _older_format(path: Path) -> str:
    """What to do about a format that LeRobot neither reads nor converts; empty of any other."""
    try:
        version = json.loads(path.read_text(encoding="utf-8")).get("codebase_version")
    except (OSError, ValueError, AttributeError):
        return ""
    if version is None:
        return "its meta/info.json has no codebase_version"
    numbers = str(version).removeprefix("v").split(".")[:2]
    if not all(number.isdigit() for number in numbers) or [int(number) for number in numbers] >= [2, 1]:
        return ""
    return f"its format is {version}, and LeRobot converts from v2.1 on: first take a LeRobot of 2025 for it"


def read_demonstrations(
    config: DemosConfig, adapter: PolicyAdapter, reward: str, task: str
) -> DemonstrationData:
    """Open the dataset of a ``DemosConfig``, check that it fits the policy, and cut it into episodes.

    Args:
        config, adapter: of the demonstrations, and the policy.
        reward: ``env`` needs the column ``next.reward``.
        task: the environment's instruction; unless episodes are named, those of this task take part, if any.

    Raises:
        UserError: the dataset is not there, is broken, or does not fit.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

    root = Path(config.root).expanduser() if config.root else None
    name = config.repo_id or f"local/{root.resolve().name}"
    where = {"repo_id": name, "root": root, "revision": config.revision}
    meta = open_dataset("--demos", name, config.root, partial(LeRobotDatasetMetadata, **where))
    chosen, total = config.episodes, meta.total_episodes
    if wrong := [index for index in chosen or () if not 0 <= index < total]:
        raise UserError("--demos.episodes", f"the dataset has episodes 0 to {total - 1}, got {wrong[0]}")
    features, notes = meta.features, []
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
    keys = [names[key] for key in required]
    times = [-back / meta.fps for back in reversed(range(adapter.n_obs_steps))]
    history = {"episodes": chosen and sorted(set(chosen)), "delta_timestamps": dict.fromkeys(keys, times)}
    dataset = open_dataset("--demos", name, config.root, partial(LeRobotDataset, **where, **history))
    index = _column(dataset, "episode_index").reshape(-1)
    firsts = np.flatnonzero(np.diff(index, prepend=index[:1] - 1))
    successes, rule = _successes(dataset, config, firsts)
    if rule == GUESS:
        other = "" if "next.reward" not in features else ", and next.reward tells more than success"
        notes.append(
            f"demonstrations: the dataset has no next.success{other}, so every episode's end counts as "
            "success (--demos.success)"
        )
    rewards = _column(dataset, "next.reward").reshape(-1) if reward == "env" else np.zeros(len(index))
    spans = list(zip(firsts, [*firsts[1:], len(index)], strict=True))
    if chosen is None:
        tasks = [str(name) for name in meta.tasks.index]
        ours = _column(dataset, "task_index").reshape(-1)[firsts]
        same = [span for span, number in zip(spans, ours, strict=True) if tasks[int(number)] == task]
        if same and len(same) < len(spans):
            notes.append(f"demonstrations: {len(same)} of {len(spans)} episodes are of the task '{task}'")
        elif not same:
            why = f"no episode is of the task '{task}'" if task else "the environment names no task"
            notes.append(f"demonstrations: {why}; all {len(spans)} take part")
        spans = same or spans
    actions = _column(dataset, "action").astype(np.float32).reshape(len(index), width)
    episodes = [Demonstration.of(int(a), actions[a:b], rewards[a:b], successes[a:b]) for a, b in spans]
    episodes = [episode for episode in episodes if len(episode.rewards)]
    if not episodes:
        raise UserError(OPTION, "no episode of the dataset has a step to learn from")
    return DemonstrationData(config, dataset, episodes, keys, notes, rule)


def _successes(dataset: Any, config: DemosConfig, firsts: np.ndarray) -> tuple[np.ndarray, str]:
    """(N,) whether each recorded step succeeds, and how that was told; ``firsts``: episodes' first rows."""
    kind, columns = config.success, dataset.features
    named = next((name for name in SUCCESS_COLUMNS if name in columns), None)
    if kind == "auto" and named:
        kind = "column"
    if kind == "auto" and "next.reward" in columns:
        rewards = _column(dataset, "next.reward").reshape(-1)
        levels = sparse_levels(rewards, firsts)
        if levels is not None:
            rule = "next.reward, which is {:g} without success and {:g} with".format(*levels)
            return _at_the_end(rewards >= levels[1], firsts, rule)
    column = {"column": named or SUCCESS_COLUMNS[0], "reward": "next.reward"}.get(kind)
    if column is None:
        ends = np.isin(np.arange(len(dataset)) + 1, [*firsts, len(dataset)])
        return ends, GUESS if kind == "auto" else "every episode's end"
    if column not in columns:
        raise UserError("--demos.success", f"the dataset has no column {column}")
    values = _column(dataset, column).reshape(-1)
    if kind == "column":
        return _at_the_end(values > 0, firsts, column)
    rule = f"{column} of {config.reward_threshold:g} or more"
    return _at_the_end(values >= config.reward_threshold, firsts, rule)


def _at_the_end(won: np.ndarray, firsts: np.ndarray, rule: str) -> tuple[np.ndarray, str]:
    """``won`` (N,) and its ``rule``; where it is the same in all of an episode, success comes at its end."""
    lengths = np.diff([*firsts, len(won)])
    label = won[firsts]
    if not (won == np.repeat(label, lengths)).all() or not (lengths[label] > 1).any():
        return won, rule
    ends = np.zeros_like(won)
    ends[(firsts + lengths - 1)[label]] = True
    return ends, f"{rule}, a label of whole episodes"


def sparse_levels(rewards: np.ndarray, firsts: np.ndarray) -> tuple[float, float] | None:
    """The reward without success and with it, where it says nothing else; ``None`` of any other reward.

    HIL-SERL's recordings have 0 and 1, goal-conditioned environments -1 and 0. Where all episodes begin at
    the higher one (``firsts`` are their first rows), it pays for each step survived.
    """
    levels = np.unique(rewards)
    if len(levels) == 1 and levels[0] in (0.0, -1.0):
        return float(levels[0]), float(levels[0]) + 1.0
    if len(levels) != 2 or (rewards[firsts] == levels[1]).all():
        return None
    return float(levels[0]), float(levels[1])


def rate_warning(dataset: Any, env_fps: float | None) -> list[str]:
    """A line where a LeRobotDataset was recorded at another rate than the environment's ``env_fps``."""
    if env_fps is None or float(dataset.fps) == float(env_fps):
        return []
    return [
        f"warning: the dataset has {dataset.fps:g} frames a second, the environment {env_fps:g} (--env.fps): "
        "its chunks last another time than those that are executed"
    ]


def failures_note(dataset: Any) -> list[str]:
    """A line where episodes of a LeRobotDataset do not succeed: they are cloned all the same."""
    column = next((name for name in SUCCESS_COLUMNS if name in dataset.features), None)
    if column is None:
        return []
    number, success = _column(dataset, "episode_index"), _column(dataset, column)
    episodes, won = np.unique(number), np.unique(number[success.reshape(len(number), -1).any(1)])
    if len(won) == len(episodes):
        return []
    mend = f"; --dataset.episodes=[{','.join(map(str, won))}] takes those that do" if len(won) else ""
    lost = f"{len(episodes) - len(won)} of {len(episodes)} episodes"
    return [f"note: {lost} of the dataset do not succeed ({column}), and are cloned like the rest{mend}"]


def _column(dataset: Any, name: str) -> np.ndarray:
    return np.asarray(dataset.hf_dataset.with_format("numpy")[name][:])
