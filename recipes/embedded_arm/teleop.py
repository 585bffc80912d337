"""A teleoperator that pushes the cube by itself, for takeovers: `--teleop.type=scripted_pusher`."""

from dataclasses import dataclass
from typing import Any

from lerobot.teleoperators import Teleoperator, TeleoperatorConfig
from lerobot.utils.errors import DeviceNotConnectedError

from trimtab.recipes.embedded_arm.arm import PARKED, MujocoArm
from trimtab.recipes.embedded_arm.pusher import Pusher


@TeleoperatorConfig.register_subclass("scripted_pusher")
@dataclass(kw_only=True)
class ScriptedPusherConfig(TeleoperatorConfig):
    """`--teleop.type=scripted_pusher`."""

    # The `id` of the `mujoco_arm` that it watches, in the same process.
    arm: str | None = None


class ScriptedPusher(Teleoperator):
    """Watches a connected ``MujocoArm``; each action brings it nearer to success, from wherever it is."""

    config_class, name = ScriptedPusherConfig, "scripted_pusher"

    def __init__(self, config: ScriptedPusherConfig) -> None:
        super().__init__(config)
        self.config = config
        self._pusher: Pusher | None = None

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(PARKED, float)

    @property
    def feedback_features(self) -> dict[str, Any]:
        return {}

    @property
    def is_connected(self) -> bool:
        return self._pusher is not None

    def connect(self, calibrate: bool = True) -> None:
        self._pusher = Pusher()

    @property
    def is_calibrated(self) -> bool:
        return True

    def calibrate(self) -> None:
        """There is nothing to calibrate."""

    def configure(self) -> None:
        """There is nothing to configure."""

    def get_action(self) -> dict[str, Any]:
        """Raises ``DeviceNotConnectedError`` where it, or the arm that it watches, is not connected."""
        arm = MujocoArm.connected.get(self.config.arm)
        if self._pusher is None or arm is None:
            raise DeviceNotConnectedError(f"{self} or the arm '{self.config.arm}' is not connected")
        return self._pusher.act(*arm.places())

    def send_feedback(self, feedback: dict[str, Any]) -> None:
        """It feels nothing."""

    def disconnect(self) -> None:
        self._pusher = None
