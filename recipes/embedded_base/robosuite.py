"""Demonstrations of robomimic's Lift, Can and Square by operators of mixed skill."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE
from scipy.spatial.transform import Rotation

from trimtab.rl.envs.robosuite import make

SEED_OFFSET = 50_000_000  # demonstrations never start where training or evaluation does
DOWN = Rotation.from_quat([1.0, 0.0, 0.0, 0.0])  # the gripper's orientation: down, its fingers along y
OPEN, CLOSED = -1.0, 1.0
STEP = np.array([0.05] * 3 + [0.5] * 3)  # metres and radians of an action of 1
CAN_BIN = np.array([0.1975, 0.4025])  # the middle of the can's bin, x and y in metres
PEG = np.array([0.23, 0.10])
ABOVE = 0.08

Plan = Generator[tuple[np.ndarray, float, float], dict[str, Any], None]


def yaw(quaternion: np.ndarray) -> float:
    """Rotation about the vertical axis, in radians, of a quaternion x y z w."""
    x = Rotation.from_quat(quaternion).apply([1.0, 0.0, 0.0])
    return float(np.arctan2(x[1], x[0]))


def nearest(angle: float, period: float) -> float:
    """``angle`` up to multiples of ``period``, next to 0."""
    return (angle + period / 2) % period - period / 2


def hand(raw: dict[str, Any]) -> np.ndarray:
    return raw["robot0_eef_pos"]


def go(raw, target, turn: float, grip: float, close: float = 0.01, steps: int = 60) -> Plan:
    """Move until the gripper is ``close`` to ``target(raw)``, in metres, for at most so many steps."""
    for _ in range(steps):
        if np.linalg.norm(target(raw) - hand(raw)) < close:
            break
        raw = yield target(raw), turn, grip
    return raw


def stay(raw, target, turn, grip, steps) -> Plan:
    here = target(raw)
    for _ in range(steps):
        raw = yield here, turn, grip
    return raw


def grasp(raw, seen, turn) -> Plan:
    raw = yield from go(raw, lambda raw: seen(raw) + [0, 0, ABOVE], turn, OPEN, 0.02)
    raw = yield from go(raw, seen, turn, OPEN, 0.012, 25)
    return (yield from stay(raw, hand, turn, CLOSED, 8))


def lift(raw, error) -> Plan:
    turn = nearest(yaw(raw["cube_quat"]), np.pi / 2)
    raw = yield from grasp(raw, lambda raw: raw["cube_pos"] + error, turn)
    while True:
        raw = yield from stay(raw, lambda raw: hand(raw) * [1, 1, 0] + [0, 0, 0.95], turn, CLOSED, 300)


def can(raw, error) -> Plan:
    raw = yield from grasp(raw, lambda raw: raw["Can_pos"] + error, 0.0)
    raw = yield from go(raw, lambda raw: hand(raw) * [1, 1, 0] + [0, 0, 1.06], 0.0, CLOSED, 0.05)
    raw = yield from go(raw, lambda raw: np.array([*CAN_BIN, 1.06]), 0.0, CLOSED, 0.03)
    raw = yield from go(raw, lambda raw: np.array([*CAN_BIN, 0.93]), 0.0, CLOSED, 0.015, 20)
    raw = yield from stay(raw, hand, 0.0, OPEN, 5)
    while True:
        raw = yield from stay(raw, lambda raw: np.array([*CAN_BIN, 1.06]), 0.0, OPEN, 300)


def square(raw, error) -> Plan:
    def handle(raw):
        return raw["SquareNut_pos"] + Rotation.from_quat(raw["SquareNut_quat"]).apply([0.054, 0, 0])

    turn = nearest(yaw(raw["SquareNut_quat"]), np.pi)
    raw = yield from grasp(raw, lambda raw: handle(raw) + error, turn)
    raw = yield from go(raw, lambda raw: hand(raw) * [1, 1, 0] + [0, 0, 1.0], turn, CLOSED, 0.02)
    turn = np.round(turn / (np.pi / 2)) * np.pi / 2

    def over(z):
        return lambda raw: np.array([*(hand(raw)[:2] + PEG - raw["SquareNut_pos"][:2]), z])

    raw = yield from go(raw, over(1.0), turn, CLOSED, 0.006)
    raw = yield from go(raw, over(0.86), turn, CLOSED, 0.005, 30)
    while True:
        raw = yield from stay(raw, over(0.85), turn, OPEN, 300)


PLANS = {"Lift": lift, "Can": can, "Square": square}


def displaced(position, center, size, p_bad, rng):
    """The blind spot: seen towards (and past) the middle."""
    if rng.random() >= p_bad:
        return np.zeros(3)
    side = 1.0 if position[0] < center else -1.0
    return np.array([side * size * rng.uniform(0.8, 1.3), 0, 0])


MIX = {"Lift": ("cube_pos", 0, 0.0, 0.055, 0.5, 70), "Can": ("Can_pos", 0, 0.1, 0.065, 0.5, 170), "Square": ("SquareNut_pos", 1, 0.1675, 0.065, 0.4, 200)}


def episodes(task, count, seed, size=None, p_bad=None, noise=0.1, length=None):
    env = make(task)
    key, axis, center, size0, p0, length0 = MIX[task]
    for episode in range(count):
        start = SEED_OFFSET + seed * 100_000 + episode
        env.reset(seed=start)
        rng = np.random.default_rng([start, 2])
        error = displaced(env.unwrapped.raw[key][[axis]], center, size or size0, p0 if p_bad is None else p_bad, rng)
        yield list(demonstrate(env, PLANS[task], error, noise, start, length or length0))
    env.close()


import functools

TASKS_ = {task: functools.partial(episodes, task) for task in PLANS}


def towards(raw, position, turn, grip) -> np.ndarray:
    current = Rotation.from_quat(raw["robot0_eef_quat"])
    rotation = (Rotation.from_euler("z", turn) * DOWN * current.inv()).as_rotvec()
    return np.append(np.concatenate([position - hand(raw), rotation]) / STEP, grip)


def demonstrate(env, plan, error: np.ndarray, noise: float, seed: int, length: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng([seed, 1])
    observation, _ = env.reset(seed=seed)
    raw = env.unwrapped.raw
    steps = plan(raw, error)
    wanted = next(steps)
    for step in range(length):
        action = towards(raw, *wanted)
        action[:6] += rng.normal(0.0, noise, 6)
        action = np.clip(action, -1, 1).astype(np.float32)
        following, reward, terminated, truncated, info = env.step(action)
        raw = env.unwrapped.raw
        ended = terminated or truncated or step == length - 1
        yield {
            OBS_STATE: observation["agent_pos"].astype(np.float32),
            OBS_ENV_STATE: observation["environment_state"].astype(np.float32),
            ACTION: action,
            "next.reward": np.array([reward], dtype=np.float32),
            "next.success": np.array([info["is_success"]]),
            "next.done": np.array([ended]),
            "task": env.unwrapped.task_description,
        }
        if ended:
            return
        wanted = steps.send(raw)
        observation = following
