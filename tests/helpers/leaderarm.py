"""A leader arm without hardware. LeRobot looks for ``LeaderArm`` in a module of this name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lerobot.teleoperators import Teleoperator, TeleoperatorConfig

from trimtab.recipes.embedded_arm.arm import START


@TeleoperatorConfig.register_subclass("leader_arm")
@dataclass(kw_only=True)
class LeaderArmConfig(TeleoperatorConfig):
    # Where a hand holds it: START, but for the first joint.
    pan: float = 0.0
    # It can be moved to where the robot is.
    motors: bool = False


class LeaderArm(Teleoperator):
    """A leader of the embedded arm's joints that stays where it is put."""

    config_class, name = LeaderArmConfig, "leader_arm"
    is_connected = is_calibrated = torque = False

    def __init__(self, config: LeaderArmConfig) -> None:
        super().__init__(config)
        self.pose = START | {"shoulder_pan.pos": config.pan}
        self.feedback_features = self.action_features if config.motors else {}

    action_features: ClassVar = dict.fromkeys(START, float)
    feedback_features: ClassVar = {}

    def connect(self, calibrate: bool = True) -> None:
        self.is_connected = True

    def disconnect(self) -> None:
        self.is_connected = False

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    def get_action(self) -> dict[str, float]:
        return dict(self.pose)

    def send_feedback(self, feedback: dict[str, float]) -> None:
        assert self.torque
        self.pose = dict(feedback)

    def enable_torque(self) -> None:
        self.torque = True

    def disable_torque(self) -> None:
        self.torque = False
