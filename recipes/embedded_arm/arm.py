"""A small MuJoCo arm on a table with a cube, as a LeRobot `Robot` (`--robot.type=mujoco_arm`).

The task: push the cube away from the base, beyond the line at `LINE`. The arm cannot see success, as no robot
can; `succeeded` is for the person, or the script that plays one.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig
from lerobot.robots.utils import ensure_safe_goal_position
from lerobot.utils.errors import DeviceAlreadyConnectedError, DeviceNotConnectedError

from trimtab.rl.rendering import choose_gl_backend

LINE = 0.27  # metres from the base's axis to the cube's middle, from which on the task is done
TABLE = 0.36  # metres from the base's axis to the round table's edge
SHOULDER, LINK, HAND = 0.10, 0.16, 0.09  # metres: the shoulder's height, both links, wrist to fingertips
# Degrees (0: both links and the hand point up), but for the gripper: 0 closed, 100 open.
JOINTS = {
    "shoulder_pan": (-100.0, 100.0),
    "shoulder_lift": (-60.0, 110.0),
    "elbow_flex": (0.0, 155.0),
    "wrist_flex": (-60.0, 130.0),
    "gripper": (0.0, 100.0),
}
PARKED = dict(zip((f"{name}.pos" for name in JOINTS), (0.0, -30.0, 140.0, 70.0, 0.0)))
START = dict(zip(PARKED, (0.0, -15.0, 133.0, 62.0, 0.0)))  # the closed gripper above the table
CUBE, CAMERA = ("cube_x.pos", "cube_y.pos"), "front"
SUBSTEP = 1 / 600  # seconds of physics, at most
UNITS = np.array([np.pi / 180] * 4 + [0.03 / 100])  # radians and metres of one unit of each joint

XML = f"""
<mujoco>
  <option integrator="implicitfast"/>
  <visual><global offwidth="256" offheight="256"/><quality shadowsize="0"/></visual>
  <default>
    <geom friction="0.6 0.005 0.0001"/>
    <joint damping="0.05" armature="0.02"/>
    <default class="arm"><geom contype="2" conaffinity="0" mass="0.08" rgba="0.9 0.6 0.1 1"/></default>
    <default class="finger">
      <geom type="box" size="0.006 0.015 0.022" contype="2" conaffinity="1" mass="0.02" rgba="0.2 0.2 0.2 1"/>
    </default>
  </default>
  <worldbody>
    <light pos="0.2 0 1" dir="0 0 -1" castshadow="false"/>
    <camera name="{CAMERA}" pos="0.75 0 0.5" xyaxes="0 1 0 -0.6 0 0.8" fovy="50"/>
    <geom type="cylinder" size="{TABLE} 0.02" pos="0 0 -0.02" conaffinity="2" rgba="0.8 0.8 0.8 1"/>
    <geom type="plane" size="2 2 0.1" pos="0 0 -0.5" rgba="0.4 0.4 0.4 1"/>
    <body name="base">
      <geom type="cylinder" size="0.04 0.04" pos="0 0 0.04" contype="0" conaffinity="0" rgba="0.2 0.2 0.2 1"/>
      <body pos="0 0 {SHOULDER}" childclass="arm">
        <joint name="shoulder_pan" axis="0 0 1"/>
        <geom type="sphere" size="0.025"/>
        <body>
          <joint name="shoulder_lift" axis="0 1 0"/>
          <geom type="capsule" size="0.014" fromto="0 0 0 0 0 {LINK}"/>
          <body pos="0 0 {LINK}">
            <joint name="elbow_flex" axis="0 1 0"/>
            <geom type="capsule" size="0.012" fromto="0 0 0 0 0 {LINK}"/>
            <body pos="0 0 {LINK}">
              <joint name="wrist_flex" axis="0 1 0"/>
              <geom type="box" size="0.01 0.03 0.02" pos="0 0 0.025"/>
              <geom class="finger" pos="0 -0.015 {HAND - 0.022}"/>
              <site name="tip" pos="0 0 {HAND}"/>
              <body pos="0 0.015 {HAND - 0.022}">
                <joint name="gripper" type="slide" axis="0 1 0" armature="0.1"/>
                <geom class="finger"/>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>
    <body name="cube" pos="0.18 0 0.02">
      <freejoint/>
      <geom type="box" size="0.02 0.02 0.02" mass="0.05" conaffinity="3" rgba="0.8 0.1 0.1 1"/>
    </body>
  </worldbody>
  <actuator>
    <position joint="shoulder_pan" kp="20" kv="1.5"/>
    <position joint="shoulder_lift" kp="20" kv="1.5"/>
    <position joint="elbow_flex" kp="20" kv="1.5"/>
    <position joint="wrist_flex" kp="20" kv="1.5"/>
    <position joint="gripper" kp="200" kv="9"/>
  </actuator>
</mujoco>
"""


@RobotConfig.register_subclass("mujoco_arm")
@dataclass(kw_only=True)
class MujocoArmConfig(RobotConfig):
    """`--robot.type=mujoco_arm`."""

    # Actions per second that it is meant for.
    fps: int = 15
    # `real`: physics follow the wall clock, whoever waits. `step`: each action is 1/fps of physics.
    clock: str = "real"
    # Seconds of physics per second of the wall clock, for `real`: control it with `fps * speed`.
    speed: float = 1.0
    # A camera `front` of so many pixels a side.
    camera: bool = False
    pixels: int = 96
    # Degrees that one action may move a joint from where it is (the gripper: hundredths), as in LeRobot.
    max_relative_target: float | None = None
    # The so many-th action raises LeRobot's bus error; hangs for an hour. Actions are counted from 1.
    fail_after: int | None = None
    hang_after: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clock not in ("real", "step"):
            raise ValueError(f"clock is real or step, not '{self.clock}'")
        if self.fps < 1 or self.speed <= 0 or self.pixels < 1:
            raise ValueError("fps, speed and pixels must be positive")


class MujocoArm(Robot):
    """The arm, parked when it is made. It holds its last target; reconnecting finds it where it was.

    Attributes:
        sends: calls of ``send_action``.
        connected: arms that are connected, by their configs' ids; a scripted teleoperator looks there.
    """

    config_class, name = MujocoArmConfig, "mujoco_arm"
    connected: dict[str | None, MujocoArm] = {}  # noqa: RUF012 - shared on purpose

    def __init__(self, config: MujocoArmConfig) -> None:
        super().__init__(config)
        self.config, self.sends = config, 0
        self._lock, self._over = threading.Lock(), threading.Event()
        self._clock: threading.Thread | None = None
        self._model: Any = None

    def _make(self) -> None:
        choose_gl_backend()
        import mujoco

        self._mujoco, self._model = mujoco, mujoco.MjModel.from_xml_string(XML)
        self._substeps = int(np.ceil(1 / self.config.fps / SUBSTEP))
        self._model.opt.timestep = 1 / self.config.fps / self._substeps
        self._data = mujoco.MjData(self._model)
        self._renderer: Any = None
        self._data.qpos[:5] = self._data.ctrl[:] = np.array([*PARKED.values()]) * UNITS
        mujoco.mj_forward(self._model, self._data)

    @property
    def observation_features(self) -> dict[str, Any]:
        """Joints in degrees, the cube's place on the table in centimetres, the camera's picture."""
        numbers = dict.fromkeys([*PARKED, *CUBE], float)
        pixels = self.config.pixels
        return numbers | ({CAMERA: (pixels, pixels, 3)} if self.config.camera else {})

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(PARKED, float)

    @property
    def is_connected(self) -> bool:
        return self.connected.get(self.id) is self

    @property
    def is_calibrated(self) -> bool:
        return True

    def calibrate(self) -> None:
        """There is nothing to calibrate."""

    def configure(self) -> None:
        """There is nothing to configure."""

    def connect(self, calibrate: bool = True) -> None:
        if self.id in self.connected:
            raise DeviceAlreadyConnectedError(f"{self} is connected already")
        if self._model is None:
            self._make()
        self.connected[self.id] = self
        if self.config.clock == "real":
            self._over.clear()
            self._clock = threading.Thread(target=self._follow_the_clock, daemon=True)
            self._clock.start()

    def disconnect(self) -> None:
        self._check()
        del self.connected[self.id]
        self._over.set()
        if self._clock is not None:
            self._clock.join()
        if self._renderer is not None:
            self._renderer.close()
        self._clock = self._renderer = None

    def _check(self) -> None:
        if not self.is_connected:
            raise DeviceNotConnectedError(f"{self} is not connected")

    def _follow_the_clock(self) -> None:
        step = self._model.opt.timestep / self.config.speed  # seconds of the wall clock
        done = time.perf_counter()
        while not self._over.wait(0.002):
            steps = int((time.perf_counter() - done) / step)
            with self._lock:
                self._mujoco.mj_step(self._model, self._data, nstep=steps)
            done += steps * step

    def get_observation(self) -> dict[str, Any]:
        self._check()
        with self._lock:
            found = dict(zip(PARKED, (self._data.qpos[:5] / UNITS).tolist()))
            x, y = self._data.body("cube").xpos[:2].tolist()
            if self.config.camera:
                if self._renderer is None:
                    self._renderer = self._mujoco.Renderer(
                        self._model, self.config.pixels, self.config.pixels
                    )
                self._renderer.update_scene(self._data, CAMERA)
        found |= dict(zip(CUBE, (100 * x, 100 * y)))
        return found | ({CAMERA: self._renderer.render()} if self.config.camera else {})

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Set targets of the joints named in ``action``.

        Returns:
            What was sent: within the joints' ranges and ``max_relative_target``.

        Raises:
            ConnectionError: ordered by ``fail_after``.
            ValueError: a target is not a number.
        """
        self._check()
        self.sends += 1
        if self.sends == self.config.fail_after:
            raise ConnectionError("Failed to write 'Goal_Position'. [TxRxResult] There is no status packet!")
        if self.sends == self.config.hang_after:
            time.sleep(3600)
        goals = {key.removesuffix(".pos"): float(value) for key, value in action.items()}
        if not np.isfinite([*goals.values()]).all():
            raise ValueError(f"not a number among the targets: {goals}")
        goals = {name: float(np.clip(goal, *JOINTS[name])) for name, goal in goals.items()}
        with self._lock:
            if self.config.max_relative_target is not None:
                present = dict(zip(JOINTS, (self._data.qpos[:5] / UNITS).tolist()))
                pairs = {name: (goal, present[name]) for name, goal in goals.items()}
                goals = ensure_safe_goal_position(pairs, self.config.max_relative_target)
            for index, name in enumerate(JOINTS):
                if name in goals:
                    self._data.ctrl[index] = goals[name] * UNITS[index]
            if self.config.clock == "step":
                self._mujoco.mj_step(self._model, self._data, nstep=self._substeps)
        return {f"{name}.pos": goal for name, goal in goals.items()}

    def place_cube(self, seed: int) -> None:
        """Put the cube where a person would for the episode ``seed``: on an arc before the arm."""
        self._check()
        rng, tip, place = np.random.default_rng(seed), self.places()[0], np.zeros(3)
        while np.linalg.norm(place - tip) < 0.05 or not place.any():  # beside the gripper, not in it
            radius, bearing = rng.uniform(0.16, 0.19), np.deg2rad(rng.uniform(-20, 20))
            place = np.array([radius * np.cos(bearing), radius * np.sin(bearing), 0.02])
        turn = (bearing + np.deg2rad(rng.uniform(-10, 10))) / 2
        with self._lock:
            self._data.qpos[5:] = [*place, np.cos(turn), 0, 0, np.sin(turn)]
            self._data.qvel[5:] = 0
            self._mujoco.mj_forward(self._model, self._data)

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the fingertips and the cube's middle are: each (3,) in metres, from the base on the table."""
        with self._lock:
            return self._data.site("tip").xpos.copy(), self._data.body("cube").xpos.copy()

    def succeeded(self) -> bool:
        """Whether the cube lies on the table, beyond the line."""
        cube = self.places()[1]
        return bool(np.hypot(*cube[:2]) >= LINE and cube[2] > 0)
