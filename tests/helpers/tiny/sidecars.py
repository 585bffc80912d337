"""Sidecars of a GR00T checkpoint, as NVIDIA's have them."""

import json
from pathlib import Path
from typing import Any

from trimtab.adapters.tiny.parts import ACTION_DIM, SIZES, STATE_DIM

TAG = "tiny_arm"
HORIZON = SIZES["groot"]["action_horizon"] - 1


def write_sidecars(folder: Path, relative: bool) -> None:
    """Write statistics and modalities of one embodiment, the arm first and the gripper last."""
    groups = {"state": {"arm": STATE_DIM - 1, "gripper": 1}, "action": {"arm": ACTION_DIM - 1, "gripper": 1}}
    if relative:  # as many joints as there are actions
        groups["state"] = {"arm": ACTION_DIM - 1, "gripper": STATE_DIM - ACTION_DIM + 1}
    stats: dict[str, Any] = {
        kind: {
            name: {"min": [-1.5] * size, "max": [2.0] * size, "mean": [0.1] * size, "std": [1.0] * size}
            for name, size in sizes.items()
        }
        for kind, sizes in groups.items()
    }
    rows = [[0.1 * (step + 1)] * (ACTION_DIM - 1) for step in range(HORIZON)]  # one per step
    stats["relative_action"] = {
        "arm": {"min": [[-x for x in row] for row in rows], "max": rows, "mean": rows, "std": rows}
    }
    representations = {"arm": "relative" if relative else "absolute", "gripper": "absolute"}
    modalities = {
        "state": {"modality_keys": list(groups["state"]), "delta_indices": [0]},
        "video": {"modality_keys": ["camera1", "camera2"], "delta_indices": [0]},
        "action": {
            "modality_keys": list(groups["action"]),
            "delta_indices": list(range(HORIZON)),
            "action_configs": [
                {"rep": rep, "type": "non_eef", "format": "default", "state_key": name}
                for name, rep in representations.items()
            ],
        },
    }
    processor = {
        "modality_configs": {TAG: modalities},
        "use_relative_action": relative,
        "max_action_horizon": HORIZON + 1,
        "image_target_size": [64, 64],
        "image_crop_size": [56, 56],
        "formalize_language": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "processor_config.json").write_text(json.dumps({"processor_kwargs": processor}))
    (folder / "statistics.json").write_text(json.dumps({TAG: stats}))
    (folder / "embodiment_id.json").write_text(json.dumps({TAG: 7}))
