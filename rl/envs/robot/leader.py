"""What a person drives the robot with: a LeRobot ``Teleoperator`` of the robot's own actions."""

from __future__ import annotations

import numpy as np

from trimtab.adapters.errors import UserError, reason
from trimtab.rl.envs.robot.arm import Action
from trimtab.rl.envs.robot.config import RobotEnvConfig


class Leader:
    """A connected teleoperator that the robot follows without a jump.

    One with motors goes to where the robot is before the person gets it (as in ``lerobot-rollout``). Where
    it is elsewhere all the same, the robot catches up by and by: within ``move_s`` where it is far.

    Args:
        names: of the robot's actions, all of which it must give.

    Raises:
        UserError: it gives others, or cannot be connected.
    """

    def __init__(self, config: RobotEnvConfig, names: list[str]) -> None:
        from lerobot.teleoperators import make_teleoperator_from_config

        assert config.teleop is not None
        self.config, self.names, kind = config, names, config.teleop.type
        try:
            self.teleop = make_teleoperator_from_config(config.teleop)
            features = self.teleop.action_features
            given = [*features.get("names", features)]  # LeRobot's keyboards and gamepads name them so
            if fits := {*names} <= {*given}:
                self.teleop.connect()
        except Exception as error:  # whatever its driver raises
            said = f"'{kind}' cannot be connected: {reason(error)}"
            raise UserError("--teleop.type", said) from error
        if not fits:
            said = f"'{kind}' gives {', '.join(given)}, the robot takes {', '.join(names)}"
            raise UserError("--teleop.type", f"{said}: name one of the same joints")
        self.let_go()

    def let_go(self) -> None:
        """The robot no longer follows it."""
        self._left = 0  # steps until the robot is where it is

    def meet(self, target: Action) -> None:
        """Before the first action after ``let_go``: bring it and the robot, at ``target``, together."""
        from lerobot.common.control_utils import teleop_smooth_move_to, teleop_supports_feedback

        if self._left:
            return
        if teleop_supports_feedback(self.teleop):
            teleop_smooth_move_to(self.teleop, target)
            self.teleop.disable_torque()
        far = float(np.abs(self._pose() - self._array(target)).max() / self.config.approach)
        self._left = max(1, round(self.config.move_s * self.config.fps * min(1.0, far)))

    def action(self, target: Action) -> np.ndarray:
        """What the person does (n,), with the robot at ``target``."""
        self.meet(target)
        here = self._array(target)
        action = here + (self._pose() - here) / self._left
        self._left = max(1, self._left - 1)
        return action

    def _pose(self) -> np.ndarray:
        return self._array(self.teleop.get_action())

    def _array(self, action: Action) -> np.ndarray:
        return np.array([action[name] for name in self.names], float)
