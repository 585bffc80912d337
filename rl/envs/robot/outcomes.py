"""How the episodes of a run on a robot ended: the base's, and those that were steered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trimtab.rl.envs.robot.episodes import counted_episodes
from trimtab.rl.evaluation import Evaluation

MEASURED_ON = "Episodes of the run itself: all of the base's, and the last 20 that were steered."
LAST = 20  # steered episodes that count: the policy changes as it learns


def robot_outcomes(root: Path, last: int | None = LAST) -> dict[str, Evaluation]:
    """The base's episodes, and the ``last`` steered ones, below ``root``; dropped ones are left out."""
    found: dict[str, list[dict[str, Any]]] = {"base": [], "steered": []}
    for folder, record in counted_episodes(root).items():
        found["steered" if record.get("steered") else "base"].append(record | {"number": int(folder.name)})
    found["steered"] = found["steered"][-(last or 0) :]
    return {
        name: Evaluation(
            [record["number"] for record in records],
            np.array([record["outcome"] == "success" for record in records]),
            np.array([record["steps"] for record in records]),
        )
        for name, records in found.items()
        if records
    }
