"""How the episodes of a run on a robot ended: the base's, and those that were steered."""

from pathlib import Path
from typing import Any

import numpy as np

from trimtab.rl.envs.robot.episodes import counted_episodes
from trimtab.rl.evaluation import Evaluation

MEASURED_ON = (
    "Episodes of the run itself: the last 20 that were steered, and all of the base, which drew its noise "
    "from the noise space. Those in which a person took over count as failures."
)
LAST = 20  # steered episodes that count: the policy changes as it learns


def robot_outcomes(root: Path, last: int | None = LAST) -> dict[str, Evaluation]:
    """The base's episodes, and the ``last`` steered ones, below ``root``; dropped ones are left out.

    An episode in which a person took over is no success of the policy, however it ended.
    """
    found: dict[str, list[dict[str, Any]]] = {"base": [], "steered": []}
    for folder, record in counted_episodes(root).items():
        found["steered" if record.get("steered") else "base"].append(record | {"number": int(folder.name)})
    found["steered"] = found["steered"][-(last or 0) :]
    return {
        name: Evaluation(
            [record["number"] for record in records],
            np.array(
                [record["outcome"] == "success" and not record.get("human_steps") for record in records]
            ),
            np.array([record["steps"] for record in records]),
        )
        for name, records in found.items()
        if records
    }
