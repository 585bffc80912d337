"""The embedded arm's task, demonstrated by a pusher of mixed skill.

Half of the episodes have a blind spot: the pusher sees the cube too far to the left if it lies to the left of
the arm, and too far to the right if it lies to the right, and pushes beside it. All of them move with noise.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from lerobot.utils.constants import ACTION, OBS_STATE

from trimtab.recipes.embedded_arm.arm import CUBE, PARKED, START, MujocoArm, MujocoArmConfig
from trimtab.recipes.embedded_arm.processor import StateAsEnvironmentState
from trimtab.recipes.embedded_arm.pusher import Pusher, polar
from trimtab.recipes.embedded_base.cloning import CloningConfig
from trimtab.recipes.embedded_base.demonstrations import SEED_OFFSET, frame
from trimtab.recipes.embedded_base.suites import Task

FPS, STEPS = 15, 75
P_BAD, SIGHT, NOISE = 0.56, 30.0, 1.0  # share of careless episodes; degrees off, times U(0.9, 1.1); degrees
TASK = "push the cube beyond the line"


def perform(robot: MujocoArm, seed: int, turns: Counter[float]) -> Iterator[dict[str, Any]]:
    """Yield the frames of one demonstration in the dataset's format.

    ``turns`` counts the episodes by the cube's side: of each side's, the same share is careless.
    """
    rng = np.random.default_rng([seed, 1])
    start = {name: at + rng.normal(0.0, NOISE) for name, at in START.items()}
    for _ in range(2 * FPS):
        robot.send_action(start)
    robot.place_cube(seed)
    side = float(np.sign(polar(robot.places()[1])[0]))
    turns[side] += 1
    careless = int(turns[side] * P_BAD) > int((turns[side] - 1) * P_BAD)
    pusher = Pusher(careless * side * SIGHT * rng.uniform(0.9, 1.1), recovers=False)
    for step in range(1, STEPS + 1):
        seen = np.array([*robot.get_observation().values()])
        wanted = pusher.act(*robot.places())
        sent = robot.send_action({name: at + rng.normal(0.0, NOISE) for name, at in wanted.items()})
        done, (tip, cube) = robot.succeeded(), map(polar, robot.places())
        ended = done or tip[1] > cube[1] or step == STEPS
        yield frame(seen, seen, np.array([*sent.values()]), done - 1.0, ended, TASK, done)
        if ended:
            return


def demonstrate(episodes: int, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the frames of each episode."""
    robot = MujocoArm(MujocoArmConfig(id="demonstrator", clock="step", fps=FPS))
    turns: Counter[float] = Counter()
    with robot:
        for episode in range(episodes):
            yield list(perform(robot, SEED_OFFSET + seed * 100_000 + episode, turns))


TASKS = {
    "push": Task(
        {"type": "robot", "robot.type": "mujoco_arm", "robot.clock": "step"},
        demonstrate,
        FPS,
        {OBS_STATE: [*PARKED, *CUBE], ACTION: [*PARKED]},
        (StateAsEnvironmentState(),),
        episodes=300,
        cloning=CloningConfig(steps=4000, n_action_steps=8),
    )
}
