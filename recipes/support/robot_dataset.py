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
from trimtab.rl.envs.hooks import is_attended
from trimtab.rl.envs.robot.episodes import EPISODES, EpisodeRecord, episode_folders, image_of
from trimtab.rl.envs.robot.outcomes import robot_outcomes

REPO_ID = "trimtab/robot_episodes"
DATASET = "dataset"  # in a run's folder


def keep_dataset(env: Any, output: Path) -> None:
    """Write the episodes of a run under ``output`` as its dataset, where a robot has made any that count."""
    if is_attended(env) and any(robot_outcomes(output / EPISODES).values()):
        write_dataset(output / EPISODES, output / DATASET, env.fps, env.task or "")


def write_dataset(episodes: Path, target: Path, fps: int, task: str) -> int:
    """Write the episodes below ``episodes`` to ``target``, which appears whole; dropped ones are left out.

    Returns:
        how many there are

    Raises:
        UserError: there are none, or one is broken.
    """
    import datasets

    datasets.disable_progress_bars()
    records = [EpisodeRecord.read(folder) for folder in episode_folders(episodes)]
    kept = [record for record in records if record.outcome != "abort" and record.chunks]
    if not kept:
        raise UserError("--from_episodes", f"{episodes} holds no episode that counts")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
        Recorder(Path(work) / DATASET, fps, REPO_ID).add(frames(record, task) for record in kept)
        shutil.rmtree(target, ignore_errors=True)
        (Path(work) / DATASET).rename(target)
    return len(kept)


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
