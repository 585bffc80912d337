"""A GR00T N1.7 of 0.4 M weights: the real Qwen3-VL, DiT, processors and checkpoint sidecars, narrow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.tiny.backbones import make_qwen3
from trimtab.adapters.tiny.parts import (
    ACTION_DIM,
    SIZES,
    STATE_DIM,
    camera_features,
    make_config,
    save_policy,
)

TAG = "tiny_arm"
HORIZON = SIZES["groot"]["action_horizon"] - 1  # of the sidecars


def groot(
    folder: Path, sidecars: bool = False, relative: bool = False, cameras: int = 1, **fields: Any
) -> dict[str, Any]:
    """Save the policy; the GR00T model that it names lies in ``folder/gr00t``, its Qwen3-VL beside.

    Args:
        folder, cameras, fields: as for the builders in ``policies.py``.
        sidecars: give the GR00T model statistics and horizons of its own, as NVIDIA's checkpoints have.
        relative: with sidecars, actions relative to the state, for all but the last dimension.
    """
    from lerobot.policies.groot.modeling_groot import GrootPolicy

    qwen, base = folder / "Qwen" / "Qwen3-VL-tiny", folder / "gr00t"
    make_base(base, qwen)
    if sidecars:
        write_sidecars(base, relative)
    config = make_config(
        "groot",
        fields,
        **camera_features(cameras),
        base_model_path=str(base),
        embodiment_tag=TAG if sidecars else "new_embodiment",
    )

    def shrink(preprocessor: Any) -> None:
        for step in preprocessor.steps:
            if hasattr(step, "image_target_size"):
                step.image_target_size, step.image_crop_size = [64, 64], [56, 56]  # 256 pixels by default
                step.model_name = str(qwen)  # LeRobot names NVIDIA's Cosmos-Reason2-2B, whatever the model

    save_policy(folder, config, GrootPolicy, change=shrink)
    return {"backbone": str(base), "tokenizer": str(qwen)}


def make_base(folder: Path, qwen: Path) -> None:
    """Save a narrow GR00T model (not a LeRobot policy) in ``folder``, with its Qwen3-VL in ``qwen``."""
    from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config

    make_qwen3(qwen, num_hidden_layers=3)  # of which the third is dropped, as in the real model
    config = GR00TN17Config(model_name=str(qwen), **SIZES["groot"])  # a path with "Qwen/Qwen3-VL" in it
    torch.manual_seed(0)
    model = GR00TN17(config, load_backbone_weights=False)
    with torch.no_grad():  # drawn with 0.02: at this width the chunk would be the noise itself
        for name, parameter in model.action_head.named_parameters():
            if name.endswith(("W", "attn1.to_v.weight", "attn1.to_out.0.weight")):
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)


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
    (folder / "processor_config.json").write_text(json.dumps({"processor_kwargs": processor}))
    (folder / "statistics.json").write_text(json.dumps({TAG: stats}))
    (folder / "embodiment_id.json").write_text(json.dumps({TAG: 7}))
