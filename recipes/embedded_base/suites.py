"""Benchmark suites for which `trimtab base` makes a base policy per task."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.adapters import UserError
from trimtab.recipes.embedded_base.base import BaseConfig, write_base
from trimtab.recipes.embedded_base.cloning import CloningConfig
from trimtab.recipes.embedded_base.demonstrations import record

# Modules beside this one, each with TASKS, and what to install for them.
SUITES = {
    "gym_mujoco": "lerobot_policy_trimtab[gym_mujoco]",
    "robosuite": "lerobot_policy_trimtab[robosuite]",
    "ogbench": "lerobot_policy_trimtab[ogbench]",
    "arm": "lerobot_policy_trimtab[arm]",
}


@dataclass(frozen=True)
class Task:
    """A task of a suite, and who demonstrates it.

    Attributes:
        env: options of ``--env`` that make it.
        demonstrate: (episodes, seed) -> the frames of one episode after the other, failures kept, as
            ``LeRobotDataset.add_frame`` takes them.
        fps: frames per second.
        names: by feature, what the numbers in its frames are called.
        steps: processor steps that its base takes along, after the renaming.
        episodes, cloning: what holds where the command's options are left as they are.
    """

    env: dict[str, Any]
    demonstrate: Callable[[int, int], Iterator[list[dict[str, Any]]]]
    fps: int
    names: dict[str, list[str]] = field(default_factory=dict)
    steps: tuple[Any, ...] = ()
    episodes: int = BaseConfig.episodes  # of demonstrations
    cloning: CloningConfig = field(default_factory=CloningConfig)


def suite_tasks(suite: str) -> dict[str, Task]:
    """The tasks of a suite by name.

    Raises:
        UserError: no such suite, or its package is missing.
    """
    if suite not in SUITES:
        raise UserError("--suite", f"there is no '{suite}'; choose from metaworld, {', '.join(SUITES)}")
    try:
        return importlib.import_module(f"{__package__}.{suite}").TASKS
    except ModuleNotFoundError as error:
        raise UserError("--suite", f"{suite} needs {error.name}: uv pip install '{SUITES[suite]}'") from error


def make_task_base(
    task: Task, name: str, folder: Path, episodes: int, cloning: CloningConfig, seed: int
) -> dict[str, Any]:
    """Demonstrate, record and clone a task into ``folder``, which appears only when all of it is there.

    Returns:
        What ``base.json`` holds; ``demonstrated`` is the demonstrators' success rate, or of a task without
        success their mean return.
    """

    def demonstrate(root: Path) -> dict[str, Any]:
        shown, where = {name: task.demonstrate(episodes, seed)}, f"trimtab/{name}_demonstrations"
        return {"demonstrated": record(root, where, task.fps, shown, episodes, task.names)[name]}

    default = BaseConfig()
    episodes = task.episodes if episodes == default.episodes else episodes
    asked = {key: value for key, value in vars(cloning).items() if value != getattr(default.cloning, key)}
    cloning = replace(task.cloning, **asked)
    facts = {"task": name, "env": task.env, "episodes": episodes}
    return write_base(folder, demonstrate, cloning, seed, facts, steps=task.steps)
