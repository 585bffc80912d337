"""Imported by LeRobot's commands because of this distribution's name; registers what they can use.

After `pip install`, `lerobot-eval --policy.path=BASE --env.type=metaworld_state --env.task=hammer-v3`
works without another flag.
"""

import trimtab.rl.envs.metaworld  # noqa: F401 - registers the environment type `metaworld_state`
