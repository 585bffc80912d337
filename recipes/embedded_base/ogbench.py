"""Demonstrations of OGBench's ``cube-single`` and ``scene`` by its own oracles, acting on what they *see*.

An operator is careful, or has a blind spot for a whole episode: it then sees what it reaches for displaced
along y, to a side that depends on the cube's yaw. A policy that imitates both picks one of them by its noise.
Both start from the same states: a clone would else read from the start which of them it was, and so would a
critic that learns from the demonstrations.
OGBench's observations do not tell the goal, so each policy is for one task, with one goal.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle

from trimtab.recipes.embedded_base.demonstrations import SEED_OFFSET, frame
from trimtab.recipes.embedded_base.suites import Task

FPS = 20
REST = np.array([0.425, 0.0, 0.3])  # where a hand that has done its part goes, in metres
SLIDES = "drawer", "window"  # what button 0 and button 1 unlock
# A part of ``scene`` is over once the hand is that high, in metres: the oracles' own numbers. The hand would
# else drag along what it has just closed.
UP = {"drawer": 0.18, "window": 0.28, "button": 0.16}

Info = dict[str, Any]
Expert = Callable[[Info, np.ndarray], np.ndarray]


@dataclass
class Operator:
    """How a task's demonstrations are performed."""

    # Demonstrations of each start, one of them with a blind spot.
    takes: int = 3
    # Its size in metres; an episode draws a factor of U(0.8, 1.3).
    offset: float = 0.1
    # Standard deviation of the Gaussian noise on every action, in action units.
    noise: float = 0.2
    # Steps after which it gives up.
    patience: int = 80

    def error(self, cube_yaw: float, rng: np.random.Generator) -> np.ndarray:
        """Draw a blind spot's error of sight (3,) in metres, along y."""
        size = self.offset * rng.uniform(0.8, 1.3)
        return np.array([0.0, np.copysign(size, np.cos(cube_yaw)), 0.0])


class CubeExpert:
    """Puts the cube on its target, if the cube is where it is seen.

    An error in its sight begins as the hand is over the cube. All come there, from wherever the hand was: so
    what a policy must learn of the start is the same, and it is at one place that the two ways part.
    """

    def __init__(self, env: gym.Env) -> None:
        self.scene: Any = env.unwrapped
        self.oracle = _ready(CubeMarkovOracle, env, min_norm=0.2)  # it overshoots less than with its 0.4
        self.over = False

    def __call__(self, info: Info, error: np.ndarray) -> np.ndarray:
        """The action (5,), with an ``error`` (3,) in the sight of the cube."""
        cube = info["privileged/block_0_pos"]
        self.over |= bool(np.linalg.norm((cube - info["proprio/effector_pos"])[:2]) < 0.04)
        told = {
            "privileged/block_0_pos": cube + error * self.over,
            "privileged/block_0_yaw": np.zeros(1),  # it fits between the fingers across its corners, too
            "privileged/target_block": 0,
            "privileged/target_block_pos": self.scene.cur_task_info["goal_xyzs"][0],
            "privileged/target_block_yaw": np.zeros(1),
        }
        return self.oracle.select_action(None, info | told)


class SceneExpert:
    """Unlocks, closes and locks the drawer, then the window, if the window's button is where it is seen."""

    def __init__(self, env: gym.Env) -> None:
        self.scene: Any = env.unwrapped
        self.button = _ready(ButtonMarkovOracle, env, gripper_always_closed=True)
        self.slides = [_ready(kind, env) for kind in (DrawerMarkovOracle, WindowMarkovOracle)]
        self.part = 0, "unlock"  # of which slide, and what

    def __call__(self, info: Info, error: np.ndarray) -> np.ndarray:
        """The action (5,), with an ``error`` (3,) in the sight of the window's button."""
        if self._over(info):
            self.part = self._next(info)
        index, what = self.part
        place = f"{SLIDES[index]}_handle_center_target" if what == "close" else f"btntop_{index}"
        position = self.scene._data.site(place).xpos + (error if place == "btntop_1" else 0.0)
        told = {
            "privileged/target_button": index,
            "privileged/target_button_state": int(what == "unlock"),
            "privileged/target_button_top_pos": position,
            f"privileged/target_{SLIDES[index]}_handle_pos": position,
        }
        oracle = self.slides[index] if what == "close" else self.button
        return oracle.select_action(None, info | told)

    def _over(self, info: Info) -> bool:
        index, what = self.part
        slide, unlocked = SLIDES[index], bool(info[f"privileged/button_{index}_state"])
        closed = abs(info[f"privileged/{slide}_pos"][0]) <= 0.01
        height = UP[slide if what == "close" else "button"]
        achieved = closed if what == "close" else unlocked == (what == "unlock")
        return achieved and info["proprio/effector_pos"][2] > height

    def _next(self, info: Info) -> tuple[int, str]:
        for index, slide in enumerate(SLIDES):
            unlocked = bool(info[f"privileged/button_{index}_state"])
            if abs(info[f"privileged/{slide}_pos"][0]) > 0.02:
                return index, "close" if unlocked else "unlock"
            if unlocked:
                return index, "lock"
        return self.part


def _ready(kind: Any, env: gym.Env, **options: Any) -> Any:
    """An oracle after a reset, which draws from NumPy's global generator where the hand rests."""
    oracle = kind(env=env, **options)
    oracle.reset(None, None)
    oracle._final_pos, oracle._final_yaw = REST, 0.0
    return oracle


ID = "ogbench:{}-singletask-v0"  # a task's default goal
# By task: what to do in words, who does it, and how.
EXPERTS: dict[str, tuple[str, Callable[[gym.Env], Expert]]] = {
    "cube-single": ("Move the cube to its target", CubeExpert),
    "scene": ("Close and lock the drawer and the window", SceneExpert),
}
OPERATORS = {
    "cube-single": Operator(takes=3, offset=0.1, noise=0.15, patience=60),
    "scene": Operator(takes=2, offset=0.08, noise=0.15, patience=170),
}


def demonstrate(
    name: str, episodes: int, seed: int, operator: Operator | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Yield the frames of one demonstration of a task after the other, failures too."""
    env, (description, make_expert) = gym.make(ID.format(name)), EXPERTS[name]
    operator = operator or OPERATORS[name]
    for episode in range(episodes):
        start, take = divmod(episode, operator.takes)
        start += SEED_OFFSET + seed * 100_000
        rng = np.random.default_rng([start, take])
        observation, info = env.reset(seed=start)
        expert, ended = make_expert(env), False
        frames: list[dict[str, Any]] = []
        error = np.zeros(3) if take else operator.error(info["privileged/block_0_yaw"][0], rng)
        while not ended:
            wanted = expert(info, error)
            noisy = wanted + rng.normal(0.0, operator.noise, wanted.shape)
            action, seen = np.clip(noisy, -1.0, 1.0).astype(np.float32), observation.copy()
            observation, reward, terminated, truncated, info = env.step(action)
            ended = terminated or truncated or len(frames) + 1 == operator.patience
            frames.append(frame(seen, seen, action, reward, ended, description, bool(info["success"])))
        yield frames
    env.close()


TASKS = {
    name: Task({"type": "gym", "id": ID.format(name), "fps": FPS}, partial(demonstrate, name), FPS)
    for name in EXPERTS
}
