"""How the episodes of a run on a robot ended: the base's, and those that were steered."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trimtab.rl.envs.robot.episodes import EpisodeRecord, episode_folders
from trimtab.rl.evaluation import Evaluation

LAST = 20  # steered episodes that count: the policy changes as it learns


def robot_outcomes(root: Path, last: int | None = LAST) -> dict[str, Evaluation]:
    """The base's episodes, and the ``last`` steered ones, below ``root``; dropped ones are left out."""
    found: dict[str, list[EpisodeRecord]] = {"base": [], "steered": []}
    for folder in episode_folders(root):
        record = EpisodeRecord.read(folder)
        if record.outcome != "abort" and record.chunks:
            steered = bool(record.chunks[0].note.get("steered", False))
            found["steered" if steered else "base"].append(record)
    found["steered"] = found["steered"][-(last or 0) :]
    return {
        name: Evaluation(
            [record.number for record in records],
            np.array([record.outcome == "success" for record in records]),
            np.array([record.steps for record in records]),
        )
        for name, records in found.items()
        if records
    }
