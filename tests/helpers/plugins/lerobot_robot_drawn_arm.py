"""A robot without hardware, in LeRobot's plugin convention: joints that follow, cameras that draw."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from lerobot.robots import Robot, RobotConfig

SIZE = 64  # of the pictures, in pixels


@RobotConfig.register_subclass("drawn_arm")
@dataclass(kw_only=True)
class DrawnArmConfig(RobotConfig):
    joints: int = 3
    cameras_seen: int = 2


class DrawnArm(Robot):
    """Each action moves every joint half of the way. ``seen`` and ``sent`` keep what went in and out."""

    config_class, name = DrawnArmConfig, "drawn_arm"
    seen: ClassVar[list[dict]] = []
    sent: ClassVar[list[dict]] = []

    def __init__(self, config: DrawnArmConfig) -> None:
        super().__init__(config)
        self._names = [f"joint{index + 1}.pos" for index in range(config.joints)]
        self._cameras = [f"camera{index + 1}" for index in range(config.cameras_seen)]
        self._at, self._connected = np.linspace(-0.3, 0.4, config.joints), False

    @property
    def observation_features(self) -> dict:
        return self.action_features | {camera: (SIZE, SIZE, 3) for camera in self._cameras}

    @property
    def action_features(self) -> dict:
        return dict.fromkeys(self._names, float)

    @property
    def is_connected(self) -> bool:
        return self._connected

    def connect(self, calibrate: bool = True) -> None:
        self._connected = True

    @property
    def is_calibrated(self) -> bool:
        return True

    def calibrate(self) -> None:
        """There is nothing to calibrate."""

    def configure(self) -> None:
        """There is nothing to configure."""

    def get_observation(self) -> dict:
        rows = np.linspace(-1, 1, SIZE)[:, None, None]
        columns = np.linspace(-1, 1, SIZE)[None, :, None]
        found = {name: float(value) for name, value in zip(self._names, self._at, strict=True)}
        for index, camera in enumerate(self._cameras):  # a bright spot where the arm is
            heat = np.exp(-4 * ((rows - self._at[0]) ** 2 + (columns - self._at[1] + 0.2 * index) ** 2))
            found[camera] = (255 * heat * np.ones(3)).astype(np.uint8)
        self.seen.append(found)
        return dict(found)

    def send_action(self, action: dict) -> dict:
        self.sent.append(dict(action))
        self._at = (self._at + np.clip([action[name] for name in self._names], -1, 1)) / 2
        return action

    def disconnect(self) -> None:
        self._connected = False
