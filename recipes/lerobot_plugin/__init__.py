"""Imported by LeRobot's commands because of this distribution's name; registers what they can use.

After `pip install`, `lerobot-eval --policy.path=BASE --env.type=metaworld_state --env.task=hammer-v3`
works without another flag, and so does the artefact of a steering run in the place of BASE.
"""

import contextlib

import trimtab.policies.steered.processor_trimtab
import trimtab.recipes.embedded_arm  # the robot `mujoco_arm`, and who plays the person beside it
import trimtab.rl.envs  # noqa: F401 - registers the environment types `metaworld_state` and `libero_chunks`
from trimtab.policies.steered.configuration_trimtab import TYPE

with contextlib.suppress(ImportError):  # LeRobot's policy server is an extra; it serves what this list names
    from lerobot.async_inference.constants import SUPPORTED_POLICIES

    if TYPE not in SUPPORTED_POLICIES:
        SUPPORTED_POLICIES.append(TYPE)
