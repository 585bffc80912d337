"""A connected LeRobot robot."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from lerobot.utils.constants import ACTION, OBS_STR
from lerobot.utils.feature_utils import build_dataset_frame, hw_to_dataset_features

from trimtab.adapters.errors import UserError, reason
from trimtab.rl.envs.robot.config import RobotEnvConfig

MOVE_FPS = 30  # actions a second on the way to a pose

Action = dict[str, float]


class Arm:
    """A connected LeRobot robot, within limits of our own; ``target`` is what it was sent last."""

    def __init__(self, config: RobotEnvConfig) -> None:
        from lerobot.robots import make_robot_from_config

        self.config = config
        try:
            self.robot = make_robot_from_config(config.robot)
            self.robot.connect()
            self.features = hw_to_dataset_features(self.robot.observation_features, OBS_STR)
            self.names = hw_to_dataset_features(self.robot.action_features, ACTION)[ACTION]["names"]
            self.home = self.target = self.position()
        except UserError:
            raise
        except Exception as error:  # whatever a robot's driver raises
            said = f"'{config.robot.type}' cannot be connected: {reason(error)}"  # type: ignore[union-attr]
            raise UserError("--robot.type", said) from error
        if unseen := {*self.names} - {*self.home}:
            self.robot.disconnect()
            said = f"what it observes leaves out {', '.join(sorted(unseen))}, which it is sent"
            raise UserError("--robot.type", f"{said}: only what is sent positions can be held and parked")
        odd = {*config.limits, *config.max_step, *config.start_pose, *config.park_pose} - {*self.names}
        if odd:
            self.robot.disconnect()
            raise UserError(
                "--robot.limits", f"{', '.join(sorted(odd))} is none of the robot's: {', '.join(self.names)}"
            )
        self.moved = False

    def position(self) -> Action:
        """Where it is, by the names of its actions; the names that it does not observe are left out."""
        observation = self.robot.get_observation()
        return {name: float(observation[name]) for name in self.names if name in observation}

    def observe(self) -> dict[str, np.ndarray]:
        """State (n,) and images (H, W, C) by LeRobot's feature names."""
        return build_dataset_frame(self.features, self.robot.get_observation(), OBS_STR)

    def send(self, values: np.ndarray) -> np.ndarray:
        """Send an action (n,) within the limits; what the robot says that it was sent.

        From outside of them it goes no farther out, and in as far as the action says: no jump to the limit.

        Raises:
            ValueError: it holds NaN or Inf. Nothing moves.
        """
        here = np.array([self.target[name] for name in self.names])
        low, high = self._limits()
        return self._send(np.clip(values, np.minimum(low, here), np.maximum(high, here)))

    def within(self, values: np.ndarray) -> np.ndarray:
        """The action nearest to ``values`` (n,) that no limit forbids."""
        return np.clip(values, *self._limits())

    def _limits(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest action (n,)."""
        wide = [self.config.limits.get(name, (-np.inf, np.inf)) for name in self.names]
        low, high = np.array(wide, np.float32).T
        return low, high

    def _send(self, values: np.ndarray) -> np.ndarray:
        if not np.isfinite(values).all():
            raise ValueError(f"an action holds NaN or Inf: {values}")
        action = {}
        for name, value in zip(self.names, values.tolist(), strict=True):
            step, before = self.config.max_step.get(name), self.target.get(name)
            if step is not None and before is not None:
                value = min(max(value, before - step), before + step)
            action[name] = value
        if self.config.dry_run:
            print(f"dry run, not sent: {action}")
            sent = action
        else:
            self.moved = True
            sent = self.robot.send_action(dict(action)) or action
        self.target = {name: float(sent.get(name, action[name])) for name in self.names}
        return np.array([self.target[name] for name in self.names], np.float32)

    def go_to(self, pose: Action, held: Callable[[], bool] = lambda: False) -> None:
        """Move slowly, from where it is, in a straight line of its joints, unless it is ``held``.

        It arrives, however small ``max_step`` is; and where it or ``pose`` is outside of the limits, the way
        there or from there is.
        """
        start = self.position()
        far = [abs(pose[n] - start[n]) / step for n, step in self.config.max_step.items() if n in pose]
        steps = max(1, round(self.config.move_s * MOVE_FPS), *(math.ceil(one) for one in far))
        self.target = self.target | start
        for number in range(1, steps + 1):
            if held():
                return
            share = number / steps
            values = [
                (1 - share) * start.get(name, self.target[name]) + share * pose.get(name, self.target[name])
                for name in self.names
            ]
            self._send(np.array(values))
            if not self.config.in_lockstep:
                time.sleep(1 / MOVE_FPS / self.config.speed)

    def park(self) -> None:
        """Go to the parking pose, if it has moved at all, and let go."""
        if self.moved:
            attempt("the robot cannot be parked", self.go_to, self.config.park_pose or self.home)
        attempt("the robot cannot be disconnected", self.robot.disconnect)


def attempt(problem: str, act: Callable[..., None], *args: Any) -> None:
    """Do what is to be done at the end, whatever becomes of it."""
    try:
        act(*args)
    except Exception as error:  # whatever a driver raises
        print(f"{problem}: {reason(error)}", flush=True)
