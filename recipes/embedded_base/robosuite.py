"""robomimic's Lift, Can and Square, demonstrated by operators of mixed skill.

A careful operator sees the object where it is. A careless one has a blind spot: it sees the object displaced
for a whole episode, to the left if it lies right of the middle and to the right if it lies left, closes the
gripper beside it, and goes on with nothing in hand. All move with noise.

Both start from the same states. Otherwise a clone reads from where the object lies which of them it was, and
its noise decides nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from trimtab.recipes.embedded_base.demonstrations import SEED_OFFSET, frame
from trimtab.recipes.embedded_base.suites import Task
from trimtab.rl.envs.robosuite import RobosuiteEnv, make

FPS = 20
FACTORY = f"{make.__module__}:{make.__name__}"
DOWN = Rotation.from_quat([1.0, 0.0, 0.0, 0.0])  # the gripper points down, its fingers close along y
OPEN, CLOSED = -1.0, 1.0
UNIT = np.array([0.05, 0.05, 0.05, 0.5, 0.5, 0.5])  # metres and radians that an action of 1 stands for
CAN_BIN, PEG = np.array([0.1975, 0.4025]), np.array([0.23, 0.10])  # x and y in metres
ABOVE = np.array([0.0, 0.0, 0.08])
HANDLE = np.array([0.054, 0.0, 0.0])  # of the nut, from its middle

Actions = Iterator[np.ndarray]
Pose = tuple[np.ndarray, float]  # where the gripper shall be (3,) in metres, and turned by what about z


@dataclass(frozen=True)
class Operator:
    """Who demonstrates a task."""

    plan: Callable[[RobosuiteEnv, np.ndarray], Actions]  # (environment, error of sight) -> actions
    # Where the object lies on which axis, what divides left from right there, in metres.
    seen: str
    axis: int
    middle: float
    steps: int  # of a demonstration, if it does not succeed
    takes: int = 3  # demonstrations of each start, one of them careless
    offset: float = 0.12  # the error of sight in metres, times U(0.8, 1.3)
    noise: float = 0.1  # standard deviation on every number of an action but the gripper's

    def error(self, position: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw a careless episode's error of sight (3,) in metres for an object at ``position``."""
        side = 1.0 if position[self.axis] < self.middle else -1.0
        return np.eye(3)[self.axis] * side * self.offset * rng.uniform(0.8, 1.3)


def yaw(quaternion: np.ndarray) -> float:
    """Angle about the vertical axis, in radians, of a quaternion x y z w."""
    x, y, _ = Rotation.from_quat(quaternion).apply([1.0, 0.0, 0.0])
    return float(np.arctan2(y, x))


def nearest(angle: float, period: float) -> float:
    """``angle`` up to multiples of ``period``, next to 0."""
    return (angle + period / 2) % period - period / 2


def hand(env: RobosuiteEnv, height: float) -> np.ndarray:
    """The point at ``height`` below or above the gripper, (3,) in metres."""
    return np.array([*env.raw["robot0_eef_pos"][:2], height])


def move(
    env: RobosuiteEnv, target: Callable[[], Pose], grip: float, close: float = 0.0, steps: int = 1000
) -> Actions:
    """Yield actions towards ``target()``, until within ``close`` metres of it or for ``steps``."""
    for _ in range(steps):
        position, turn = target()
        rotation = Rotation.from_euler("z", turn) * DOWN
        turned = (rotation * Rotation.from_quat(env.raw["robot0_eef_quat"]).inv()).as_rotvec()
        moved = position - env.raw["robot0_eef_pos"]
        if np.linalg.norm(moved) < close:
            return
        yield np.array([*np.concatenate([moved, turned]) / UNIT, grip])


def grasp(env: RobosuiteEnv, thing: Callable[[], np.ndarray], turn: float) -> Actions:
    """Above it, down, and close the gripper."""
    yield from move(env, lambda: (thing() + ABOVE, turn), OPEN, close=0.02, steps=80)
    yield from move(env, lambda: (thing(), turn), OPEN, close=0.012, steps=25)
    here = env.raw["robot0_eef_pos"]
    yield from move(env, lambda: (here, turn), CLOSED, steps=8)


def lift(env: RobosuiteEnv, error: np.ndarray) -> Actions:
    # Without turning: the cube fits between the fingers across its corners, too.
    yield from grasp(env, lambda: env.raw["cube_pos"] + error, 0.0)
    yield from move(env, lambda: (hand(env, 0.95), 0.0), CLOSED)


def can(env: RobosuiteEnv, error: np.ndarray) -> Actions:
    yield from grasp(env, lambda: env.raw["Can_pos"] + error, 0.0)
    yield from move(env, lambda: (hand(env, 1.06), 0.0), CLOSED, close=0.05, steps=40)
    yield from move(env, lambda: (np.array([*CAN_BIN, 1.06]), 0.0), CLOSED, close=0.03, steps=60)
    yield from move(env, lambda: (np.array([*CAN_BIN, 0.93]), 0.0), CLOSED, close=0.015, steps=20)
    yield from move(env, lambda: (np.array([*CAN_BIN, 0.93]), 0.0), OPEN, steps=5)
    yield from move(env, lambda: (np.array([*CAN_BIN, 1.06]), 0.0), OPEN)


def square(env: RobosuiteEnv, error: np.ndarray) -> Actions:
    def handle() -> np.ndarray:
        return env.raw["SquareNut_pos"] + Rotation.from_quat(env.raw["SquareNut_quat"]).apply(HANDLE) + error

    def over_peg(height: float) -> Pose:  # the nut's middle and edges, not the gripper's
        x, y = env.raw["robot0_eef_pos"][:2] + PEG - env.raw["SquareNut_pos"][:2]
        misaligned = nearest(yaw(env.raw["SquareNut_quat"]), np.pi / 2)
        turned = yaw(env.raw["robot0_eef_quat"])
        return np.array([x, y, height]), turned - misaligned

    turn = nearest(yaw(env.raw["SquareNut_quat"]), np.pi)
    yield from grasp(env, handle, turn)
    yield from move(env, lambda: (hand(env, 1.0), turn), CLOSED, close=0.02, steps=40)
    yield from move(env, lambda: over_peg(1.0), CLOSED, close=0.006, steps=80)
    yield from move(env, lambda: over_peg(0.85), CLOSED)


OPERATORS = {
    "Lift": Operator(lift, "cube_pos", 1, 0.0, steps=60),
    "Can": Operator(can, "Can_pos", 0, 0.1, steps=170),
    "Square": Operator(square, "SquareNut_pos", 1, 0.1675, steps=200),
}


def perform(env: RobosuiteEnv, operator: Operator, seed: int, take: int) -> Iterator[dict[str, Any]]:
    """Yield the frames of one demonstration in the dataset's format; take 0 of a start is careless."""
    rng = np.random.default_rng([seed, take])
    observation, _ = env.reset(seed=seed)
    error = np.zeros(3) if take else operator.error(env.raw[operator.seen], rng)
    for step, wanted in enumerate(operator.plan(env, error), 1):
        wanted[:6] += rng.normal(0.0, operator.noise, 6)
        action = np.clip(wanted, -1.0, 1.0).astype(np.float32)
        following, reward, terminated, truncated, info = env.step(action)
        ended = terminated or truncated or step == operator.steps
        seen = observation["agent_pos"], observation["environment_state"]
        yield frame(*seen, action, reward, ended, env.task_description, info["is_success"])
        if ended:
            return
        observation = following


def demonstrate(task: str, episodes: int, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the frames of each episode."""
    env, operator = make(task), OPERATORS[task]
    for episode in range(episodes):
        start, take = divmod(episode, operator.takes)
        yield list(perform(env, operator, SEED_OFFSET + seed * 100_000 + start, take))
    env.close()


TASKS = {
    name: Task(
        {"type": "gym", "factory": FACTORY, "kwargs": {"task": name}, "fps": FPS},
        partial(demonstrate, name),
        FPS,
    )
    for name in OPERATORS
}
