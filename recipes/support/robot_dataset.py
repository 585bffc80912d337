"""The episodes of a robot as a LeRobotDataset, to learn from or to train on."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.utils.constants import ACTION, OBS_STATE

from trimtab.adapters import UserError
from trimtab.recipes.finetune.data import Recorder
from trimtab.recipes.support.console import say
from trimtab.rl.envs.hooks import is_attended
from trimtab.rl.envs.robot.episodes import EPISODES, EpisodeRecord, episode_folders, image_of

REPO_ID = "trimtab/robot_episodes"
DATASET = "dataset"  # in a run's folder


def keep_dataset(env: Any, output: Path) -> None:
    """Write the episodes of a run under ``output`` as its dataset, where a robot has made any that count."""
    kept = counted(output / EPISODES) if is_attended(env) else []
    if kept:
        record(kept, output / DATASET, env.fps, env.task or "")
        minutes = sum(one.steps for one in kept) / env.fps / 60
        say(f"{len(kept)} episodes, {minutes:.1f} minutes of robot time: {output / DATASET}")


def write_dataset(episodes: Path, target: Path, fps: int, task: str) -> int:
    """Write the episodes below ``episodes`` to ``target``, which appears whole; dropped ones are left out.

    Returns:
        how many there are

    Raises:
        UserError: there are none, or one is broken.
    """
    kept = counted(episodes)
    if not kept:
        raise UserError("--from_episodes", f"{episodes} holds no episode that counts")
    record(kept, target, fps, task)
    return len(kept)


def counted(episodes: Path) -> list[EpisodeRecord]:
    """The episodes below ``episodes`` but those that were dropped."""
    found = [EpisodeRecord.read(folder) for folder in episode_folders(episodes)]
    return [one for one in found if one.outcome != "abort" and one.chunks]


def record(episodes: list[EpisodeRecord], target: Path, fps: int, task: str) -> None:
    """Write ``episodes`` as the dataset ``target``, which appears whole."""
    import datasets

    datasets.disable_progress_bars()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
        Recorder(Path(work) / DATASET, fps, REPO_ID).add(frames(one, task) for one in episodes)
        shutil.rmtree(target, ignore_errors=True)
        (Path(work) / DATASET).rename(target)


def frames(record: EpisodeRecord, task: str) -> Iterator[dict[str, Any]]:
    """The frames of an episode: what was seen, and the action that the robot says it was sent.

    Where it does not succeed, the last frame is what was seen after the last action.
    """
    steps = [
        (seen, action, bool(human))
        for chunk in record.chunks
        for seen, action, human in zip(chunk.seen[:-1], chunk.executed, chunk.human, strict=True)
    ]
    if record.outcome != "success":
        steps.append((record.chunks[-1].seen[-1], *steps[-1][1:]))
    for number, (seen, action, human) in enumerate(steps, 1):
        last = number == len(steps)
        success = last and record.outcome == "success"
        images = {key: image_of(value) for key, value in seen.items() if key != OBS_STATE}
        yield {
            OBS_STATE: np.asarray(seen[OBS_STATE], np.float32),
            **images,
            ACTION: np.asarray(action, np.float32),
            "next.reward": np.array([float(success)], np.float32),
            "next.success": np.array([success]),
            "next.done": np.array([last]),
            "intervention": np.array([human]),
            "task": task,
        }
