"""Record demonstrations of Meta-World tasks as a LeRobotDataset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE

from trimtab.recipes.embedded_base.demonstrators import OBJECT, Demonstrator, Operator
from trimtab.rl.envs.metaworld import (
    ACTION_DIM,
    AGENT_DIM,
    ENV_DIM,
    MetaworldStateConfig,
    MetaworldStateEnv,
)
from trimtab.rl.runs.progress import Progress

REPO_ID = "trimtab/metaworld_demonstrations"
SEED_OFFSET = 50_000_000  # demonstrations never start where training or evaluation does

FEATURES: dict[str, dict[str, Any]] = {
    OBS_STATE: {"dtype": "float32", "shape": (AGENT_DIM,), "names": None},
    OBS_ENV_STATE: {"dtype": "float32", "shape": (ENV_DIM,), "names": None},
    ACTION: {"dtype": "float32", "shape": (ACTION_DIM,), "names": None},
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
}


def start_center(env: MetaworldStateEnv, episodes: int = 64) -> float:
    """Median x of the object over start states, in metres: what `left` and `right` mean for a task."""
    xs = []
    for seed in range(SEED_OFFSET, SEED_OFFSET + episodes):
        env.reset(seed=seed)
        xs.append(env.state[OBJECT][0])
    return float(np.median(xs))


def demonstrate(env: MetaworldStateEnv, operator: Operator, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the frames of one demonstration in the dataset's format."""
    rng = np.random.default_rng([seed, 1])
    demonstrator = Demonstrator(env.task, operator)
    observation, _ = env.reset(seed=seed)
    demonstrator.start(env.state, rng)
    ended = False
    while not ended:
        action = demonstrator.act(env.state, rng)
        following, reward, terminated, truncated, info = env.step(action)
        ended = terminated or truncated
        yield {
            OBS_STATE: observation["agent_pos"].astype(np.float32),
            OBS_ENV_STATE: observation["environment_state"].astype(np.float32),
            ACTION: action,
            "next.reward": np.array([reward], dtype=np.float32),
            "next.success": np.array([info["is_success"]]),
            "next.done": np.array([ended]),
            "task": env.task_description,
        }
        observation = following


def with_centers(operators: dict[str, Operator]) -> dict[str, Operator]:
    """The same operators, with a ``center`` measured for each blind spot that leaves it open."""
    centered = {}
    for task, operator in operators.items():
        if operator.kind == "blind_spot" and operator.center is None:
            env = MetaworldStateEnv(task)
            operator = replace(operator, center=start_center(env))
            env.close()
        centered[task] = operator
    return centered


@contextmanager
def no_image_embedding() -> Iterator[None]:
    """LeRobot maps `embed_images` over every frame, images or not: three quarters of the recording time."""
    from lerobot.datasets import dataset_writer

    with mock.patch.object(dataset_writer, "embed_images", lambda dataset: dataset):
        yield


def record(
    root: Path,
    tasks: list[str],
    operators: dict[str, Operator],
    episodes: int,
    episode_length: int,
    seed: int = 0,
) -> dict[str, float]:
    """Record ``episodes`` demonstrations of each task under ``root``; failures are kept.

    Args:
        root: dataset folder, must not exist.
        tasks: Meta-World task names.
        operators: by task; a task without one is demonstrated with care.
        episodes: demonstrations per task.
        episode_length: time limit in steps.
        seed: shifts the start states and the operators' errors.

    Returns:
        The demonstrators' success rate by task.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset.create(
        repo_id=REPO_ID, fps=MetaworldStateConfig().fps, features=FEATURES, root=root, use_videos=False
    )
    rates: dict[str, float] = {}
    progress = Progress(total=len(tasks) * episodes, desc="demonstrations", unit="ep")
    for task in tasks:
        env = MetaworldStateEnv(task, episode_length=episode_length)
        operator = operators.get(task, Operator())
        successes = 0
        for episode in range(episodes):
            for frame in demonstrate(env, operator, SEED_OFFSET + seed * 100_000 + episode):
                dataset.add_frame(frame)
            with no_image_embedding():
                dataset.save_episode()
            successes += bool(frame["next.success"][0])
            progress.update()
            progress.set_postfix_str(f"{task} success {successes / (episode + 1):.2f}")
        env.close()
        rates[task] = successes / episodes
    progress.close()
    dataset.finalize()
    return rates
