"""Policies at their published size, with random weights or none: what encoding and denoising really cost."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.recipes.full_size import core, others, qwen, wan
from trimtab.recipes.full_size.common import Built

FULL_SIZE: dict[str, Callable[[str, int], Built]] = {
    "act": core.act,
    "diffusion": core.diffusion,
    "eo1": qwen.eo1,
    "evo1": others.evo1,
    "fastwam": wan.fastwam,
    "groot": qwen.groot,
    "molmoact2": others.molmoact2,
    "multi_task_dit": others.multi_task_dit,
    "pi0": core.pi("pi0"),
    "pi05": core.pi("pi05"),
    "smolvla": core.smolvla,
    "vla_jepa": qwen.vla_jepa,
    "wall_x": qwen.wall_x,
    "xvla": others.xvla,
}
RUNNABLE = ("act", "diffusion", "pi0", "pi05", "smolvla")  # can be built with weights, too


def full_size(policy_type: str, device: str = "meta", cameras: int = 2) -> Built:
    """An adapter at published size, and a preprocessed batch of one observation.

    Args:
        policy_type: a key of ``FULL_SIZE``.
        device: ``meta`` counts (within ``weightless.Counting``), anything else runs: ``RUNNABLE`` types only.
        cameras: how many, mostly of 480 x 640 pixels (``diffusion``: one of 96 x 96, as on pusht).
    """
    if device != "meta" and policy_type not in RUNNABLE:
        raise ValueError(f"{policy_type} at published size can be counted, not run")
    return FULL_SIZE[policy_type](device, cameras)
