"""Makers of base policies from scripted or trained demonstrators."""

import trimtab.rl.envs  # noqa: F401 - first, for it imports LeRobot in less time
