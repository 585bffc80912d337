"""``--robot.NAME=`` and ``--teleop.NAME=`` of LeRobot's commands are options of ``--env.type=robot``."""

import dataclasses
import re

from trimtab.adapters.errors import UserError
from trimtab.recipes.support.option_dicts import Options, loaded_plugins, merge, put, value_at
from trimtab.rl.envs.robot.config import RobotEnvConfig

# Of a run on a robot, where nothing else is said: what was chosen on the embedded arm.
DEFAULTS: Options = {
    # A batch of 256 costs four times the time, and there are some hundred transitions in all. After so few
    # the actor that is distilled from the critic lags behind it.
    "rl": {"type": "best_of_n", "batch_size": 64, "deployed_candidates": 16},
    "train": {
        "episodes": 60,
        "updates_per_transition": 20.0,
        "gate": {"enabled": True, "base_episodes": 10},
    },
}
OFFLINE_UPDATES = 5000  # on a robot's episodes alone
# Options of --robot that are the run's.
OF_RUN = {"episodes": "train.episodes", "base_episodes": "train.gate.base_episodes"}
OF_STATION = {field.name for field in dataclasses.fields(RobotEnvConfig)} - {"robot", "teleop", "type"}


def with_robot(given: Options) -> Options:
    """Options with those of ``robot`` and ``teleop`` where the config has them.

    Raises:
        UserError: a robot and another environment.
    """
    robot, teleop = given.get("robot"), given.get("teleop")
    if robot is None and teleop is None:
        return given
    if value_at(given, "env.type") not in (None, "robot"):
        raise UserError("--env.type", f"is {value_at(given, 'env.type')}; leave it out beside --robot.type")
    found: Options = {name: value for name, value in given.items() if name not in ("robot", "teleop")}
    moved: Options = {"env": {"type": "robot"}}
    for name, value in (robot or {}).items():
        where = OF_RUN.get(name) or (f"env.{name}" if name in OF_STATION else f"env.robot.{name}")
        put(moved, where, value)
    if teleop is not None:
        put(moved, "env.teleop", teleop)
    return merge(moved, found)


def as_of_robot(error: UserError) -> UserError:
    """An error about an option of ``--env.type=robot``, with the option as the user gives it."""

    def said(text: str) -> str:
        for name, where in OF_RUN.items():
            text = re.sub(rf"--{re.escape(where)}\b", f"--robot.{name}", text)
        text = re.sub(r"--env\.(robot|teleop)\.", r"--\1.", text)
        return re.sub(rf"--env\.(?=({'|'.join(OF_STATION)})\b)", "--robot.", text)

    return UserError(said(error.option), said(error.message))


def robot_defaults(names: set[str]) -> Options:
    """What a command with the options ``names`` takes on a robot unless it is said; registers all robots."""
    from trimtab.rl.envs.robot.station import load_robots

    load_robots([])
    found: Options = {"env": {"packages": sorted(set(loaded_plugins().values()))}}
    return merge(found, DEFAULTS if {"train", "rl"} <= names else {})


def without_environment(values: Options) -> Options:
    """What a run takes that names no environment, but something else to learn from."""
    episodes = values.get("from_episodes") is not None
    alone = episodes or str(value_at(values, "train.env_steps")) == "0"
    found: Options = {"env": {"type": "none"}} if alone else {}
    if episodes:
        found |= {"rl": DEFAULTS["rl"], "train": {"env_steps": 0, "offline_updates": OFFLINE_UPDATES}}
    return found
