"""What a person drives the robot with: a LeRobot ``Teleoperator`` of its joints, or of its hand."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from trimtab.adapters.errors import UserError, reason
from trimtab.rl.envs.robot.arm import Action
from trimtab.rl.envs.robot.config import RobotEnvConfig

DELTAS = ("delta_x", "delta_y", "delta_z")  # of the hand, -1 to 1: LeRobot's gamepads and keyboards
GRIPPER, STAY = "gripper", 1.0  # beside them: 0 closes, 2 opens
JOINT = ".pos"
# Of radians against metres. With LeRobot's 0.01 an arm of four joints goes half of the way to the side.
TURNED = 1e-4


def make_leader(config: RobotEnvConfig, names: list[str]) -> Leader:
    """Connect ``--teleop.type=`` for a robot whose actions have these ``names``.

    Raises:
        UserError: it gives other actions, or cannot be connected.
    """
    from lerobot.teleoperators import make_teleoperator_from_config

    assert config.teleop is not None
    kind = config.teleop.type
    try:
        teleop = make_teleoperator_from_config(config.teleop)
        features = teleop.action_features
        given = [*features.get("names", features)]  # LeRobot's keyboards and gamepads name them so
        joints = {*names} <= {*given}
        hand = Hand(config, names) if not joints and {*DELTAS} <= {*given} else None
        if joints or hand:
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # for gamepads, over SSH as well
            teleop.connect()
            gamepad = getattr(teleop, "gamepad", None)  # LeRobot says of a missing one that it is connected
            if not teleop.is_connected or not getattr(gamepad, "running", True):
                raise ConnectionError("it is not there (a keyboard is not, over SSH)")
    except UserError:
        raise
    except Exception as error:  # whatever its driver raises
        raise UserError("--teleop.type", f"'{kind}' cannot be connected: {reason(error)}") from error
    if not joints and not hand:
        said = f"'{kind}' gives {', '.join(given)}, the robot takes {', '.join(names)}"
        raise UserError("--teleop.type", f"{said}: name one of the same joints")
    return HandLeader(config, names, teleop, hand) if hand else Leader(config, names, teleop)


class Leader:
    """A connected teleoperator of the robot's joints, which it follows without a jump.

    One with motors goes to where the robot is before the person gets it (as in ``lerobot-rollout``). Where
    it is elsewhere all the same, the robot catches up by and by: within ``move_s`` where it is far.

    Args:
        names: of the robot's actions, all of which it must give.
    """

    def __init__(self, config: RobotEnvConfig, names: list[str], teleop: Any) -> None:
        self.config, self.names, self.teleop = config, names, teleop
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


class HandLeader(Leader):
    """One of the robot's hand, from where it is: a gamepad, a keyboard."""

    def __init__(self, config: RobotEnvConfig, names: list[str], teleop: Any, hand: Hand) -> None:
        super().__init__(config, names, teleop)
        self.hand = hand

    def meet(self, target: Action) -> None:
        """There is nothing to bring together."""

    def action(self, target: Action) -> np.ndarray:
        given = self.teleop.get_action()
        deltas = np.array([given[name] for name in DELTAS], float)
        return self._array(self.hand.moved(target, deltas, float(given.get(GRIPPER, STAY)) - STAY))


class Hand:
    """Where the robot's joints bring its hand, by LeRobot's ``RobotKinematics`` (URDF and ``placo``).

    Raises:
        UserError: there is no model, or it is of another arm.
    """

    def __init__(self, config: RobotEnvConfig, names: list[str]) -> None:
        from lerobot.model import RobotKinematics

        self.options = options = config.kinematics
        option = "--robot.kinematics.urdf_path"
        if not options.urdf_path:
            kind = config.teleop and config.teleop.type
            raise UserError(option, f"'{kind}' moves the hand: name the URDF that tells the joints of it")
        if not getattr(config.robot, "use_degrees", True):
            raise UserError("--robot.use_degrees", "the joints of a hand are in degrees; give true")
        try:
            self.kinematics = RobotKinematics(options.urdf_path, options.target_frame_name)
            known = self.kinematics.joint_names
            self.joints = [name for name in names if name.removesuffix(JOINT) in {*known} - {GRIPPER}]
            self.kinematics.joint_names = [name.removesuffix(JOINT) for name in self.joints]
            self.kinematics.forward_kinematics(np.zeros(len(self.joints)))
        except Exception as error:  # whatever its reader raises
            raise UserError(option, f"{options.urdf_path} cannot be read: {reason(error)}") from error
        if not self.joints:
            raise UserError(option, f"has {', '.join(known)}, the robot takes {', '.join(names)}")

    def moved(self, target: Action, deltas: np.ndarray, opening: float) -> Action:
        """``target`` with the hand moved by ``deltas`` (3,) and the gripper by ``opening``, all -1 to 1."""
        moved = dict(target)
        if deltas.any():
            here = np.array([target[name] for name in self.joints])
            pose = self.kinematics.forward_kinematics(here).copy()
            pose[:3, 3] += self.options.step_m * deltas
            found = self.kinematics.inverse_kinematics(here, pose, orientation_weight=TURNED)
            moved |= zip(self.joints, found.tolist(), strict=True)
        if opening and (gripper := GRIPPER + JOINT) in target:
            wanted = target[gripper] + self.options.gripper_step * opening
            moved[gripper] = min(max(wanted, 0.0), 100.0)
        return moved
