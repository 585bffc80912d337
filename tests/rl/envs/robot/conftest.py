"""A station on the embedded arm."""

import pytest

from tests.helpers.robots import Told, robot_config
from trimtab.rl.envs.robot.arm import Arm
from trimtab.rl.envs.robot.leader import make_leader
from trimtab.rl.envs.robot.station import Station


@pytest.fixture
def make():
    """A station on the embedded arm; closed again."""
    made = []

    def station(said=None, ready_after=0, **options):
        config = robot_config(**options)
        arm = Arm(config)
        made.append(arm)
        leader = make_leader(config, arm.names) if config.teleop else None
        return Station(config, arm, Told(said, ready_after), leader)

    yield station
    for arm in made:
        arm.robot.disconnect()
