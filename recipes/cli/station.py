"""`trimtab station`: the process beside a robot, for a learner on another machine."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from lerobot.envs.configs import EnvConfig

from trimtab.adapters import UserError
from trimtab.rl.envs.hooks import is_attended


@dataclass
class StationRunConfig:
    """``trimtab station``: options of ``--robot`` and ``--teleop`` as in `trimtab adapt`."""

    env: EnvConfig
    # HOST:PORT of the learner, as `trimtab adapt --robot.listen=` prints it.
    connect: str = ""
    # Likewise.
    token: str = ""


def main(config: StationRunConfig) -> None:
    from trimtab.rl.envs.robot.station import run_station

    env: Any = config.env
    if not is_attended(env) or env.robot is None:
        raise UserError("--robot.type", "name the robot of this station")
    if not config.connect.rpartition(":")[2].isdigit():
        raise UserError("--connect", f"is HOST:PORT of the learner, got '{config.connect}'")
    run_station(dataclasses.replace(env, listen=""), config.connect, config.token, again=True)
