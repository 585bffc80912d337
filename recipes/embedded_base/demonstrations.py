"""Demonstrations of Meta-World tasks by operators of mixed skill, recorded as a LeRobotDataset.

An operator acts as Meta-World's scripted expert would on what it *sees*, with noise. A careful one sees the
object where it is. A careless one sees it displaced, for a whole episode, and mostly misses. A policy that
imitates both keeps both habits and picks one of them by its noise: that is what steering can use.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, SupportsFloat

import numpy as np
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE

from trimtab.adapters.errors import UserError
from trimtab.recipes.finetune.data import Recorder
from trimtab.rl.envs.metaworld import MetaworldStateEnv
from trimtab.rl.runs.progress import Progress

REPO_ID = "trimtab/metaworld_demonstrations"
SEED_OFFSET = 50_000_000  # demonstrations never start where training or evaluation does
OBJECT = slice(4, 7)  # where every Meta-World state holds the (first) object's position, in metres
KINDS = ("careful", "shift", "blind_spot", "clumsy")
GRIPPER, LETS_GO = 3, 15  # which action; for how many steps a clumsy hand opens


@dataclass
class Operator:
    """How one task's demonstrations are performed."""

    # ``careful``; ``shift`` (the object is seen displaced in a random direction); ``blind_spot``
    # (displaced along x, away from the middle: to the right where the object lies right of ``center``, to the
    # left where it lies left of it); ``clumsy`` (the hand opens once it has moved the object by ``offset``).
    kind: str = "careful"
    # Share of the episodes with that error.
    p_bad: float = 0.0
    # Size of the error in metres; an episode draws a factor of U(0.5, 1.3) for ``shift`` and U(0.8, 1.3) for
    # ``blind_spot``.
    offset: float = 0.0
    # What divides left from right, x in metres, for ``blind_spot``; ``None`` takes the median of the task's
    # start states.
    center: float | None = None
    # Standard deviation of the Gaussian noise on every action, in action units.
    noise: float = 0.1
    # Demonstrations of this task, where they are not as many as of the others.
    episodes: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError("--demonstrators", f"kind '{self.kind}' is none of {', '.join(KINDS)}")
        if not 0.0 <= self.p_bad <= 1.0:
            raise UserError("--demonstrators", f"p_bad is a probability, got {self.p_bad}")
        if self.episodes is not None and self.episodes < 1:
            raise UserError("--demonstrators", f"episodes must be at least 1, got {self.episodes}")
        if self.offset < 0 or self.noise < 0:
            raise UserError("--demonstrators", "offset and noise cannot be negative")

    def error(self, object_position: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw an episode's error of sight (3,) in metres for an object at ``object_position``."""
        if self.kind in ("careful", "clumsy") or rng.random() >= self.p_bad:
            return np.zeros(3)
        if self.kind == "shift":
            angle = rng.uniform(0.0, 2.0 * np.pi)
            size = self.offset * rng.uniform(0.5, 1.3)
            return np.array([size * np.cos(angle), size * np.sin(angle), 0.0])
        side = 1.0 if object_position[0] > (self.center or 0.0) else -1.0
        return np.array([side * self.offset * rng.uniform(0.8, 1.3), 0.0, 0.0])


def start_center(env: MetaworldStateEnv, episodes: int = 64) -> float:
    """Median x of the object over start states, in metres: what `left` and `right` mean for a task."""
    xs = []
    for seed in range(SEED_OFFSET, SEED_OFFSET + episodes):
        env.reset(seed=seed)
        xs.append(env.state[OBJECT][0])
    return float(np.median(xs))


def frame(
    state: np.ndarray,
    environment_state: np.ndarray,
    action: np.ndarray,
    reward: SupportsFloat,
    ended: bool,
    task: str,
    success: bool | None = None,
) -> dict[str, Any]:
    """A step as ``LeRobotDataset.add_frame`` takes it, numbers as float32.

    ``ended``: the demonstration is over after it; ``success``: ``None`` of a task that has none.
    """
    told = {} if success is None else {"next.success": np.array([success])}
    return {
        OBS_STATE: state.astype(np.float32),
        OBS_ENV_STATE: environment_state.astype(np.float32),
        ACTION: action.astype(np.float32),
        "next.reward": np.array([float(reward)], dtype=np.float32),
        **told,
        "next.done": np.array([ended]),
        "task": task,
    }


def demonstrate(env: MetaworldStateEnv, operator: Operator, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the frames of one demonstration in the dataset's format."""
    from lerobot.envs.metaworld import TASK_POLICY_MAPPING

    rng, expert = np.random.default_rng([seed, 1]), TASK_POLICY_MAPPING[env.task]()
    observation, _ = env.reset(seed=seed)
    start = env.state[OBJECT].copy()
    error = operator.error(start, rng)
    lets_go = LETS_GO if operator.kind == "clumsy" and rng.random() < operator.p_bad else 0
    ended = False
    while not ended:
        believed = env.state.copy()
        believed[OBJECT] += error
        wanted = np.asarray(expert.get_action(believed), dtype=np.float64)
        if lets_go and np.linalg.norm(env.state[OBJECT] - start) > operator.offset:
            wanted[GRIPPER], lets_go = -1.0, lets_go - 1
        noisy = wanted + rng.normal(0.0, operator.noise, wanted.shape)
        action = np.clip(noisy, -1.0, 1.0).astype(np.float32)
        following, reward, terminated, truncated, info = env.step(action)
        ended = terminated or truncated
        seen = observation["agent_pos"], observation["environment_state"]
        yield frame(*seen, action, reward, ended, env.task_description, info["is_success"])
        observation = following


def episodes_of(
    task: str, operator: Operator, episodes: int, episode_length: int, seed: int
) -> Iterator[list[dict[str, Any]]]:
    """Yield the frames of each demonstration of a Meta-World task; failures are kept.

    A blind spot that leaves its ``center`` open gets it measured. ``episode_length`` is the time limit in
    steps; ``seed`` shifts the start states and the operator's errors.
    """
    env = MetaworldStateEnv(task, episode_length=episode_length)
    if operator.kind == "blind_spot" and operator.center is None:
        operator.center = start_center(env)
    for episode in range(operator.episodes or episodes):
        yield list(demonstrate(env, operator, SEED_OFFSET + seed * 100_000 + episode))
    env.close()


def record(
    root: Path,
    repo_id: str,
    fps: int,
    demonstrations: Mapping[str, Iterable[list[dict[str, Any]]]],
    episodes: int,
    names: dict[str, list[str]] | None = None,
) -> dict[str, float]:
    """Record demonstrations by task, ``episodes`` in all, each the frames of one, under ``root``.

    ``names``: by feature, what the numbers in a frame are called.

    Returns:
        The demonstrators' success rate by task, or of a task without success their mean return.
    """
    scores: dict[str, list[float]] = {task: [] for task in demonstrations}
    progress = Progress(total=episodes, desc="demonstrations", unit="ep")

    def counted() -> Iterator[list[dict[str, Any]]]:
        for task, found in scores.items():
            for frames in demonstrations[task]:
                yield frames
                total = sum(float(frame["next.reward"][0]) for frame in frames)
                found.append(float(frames[-1].get("next.success", [total])[0]))
                progress.update()
                progress.set_postfix_str(f"{task}: mean {fmean(found):.4g}")

    Recorder(root, fps, repo_id, names).add(counted())
    progress.close()
    return {task: fmean(found) for task, found in scores.items()}
