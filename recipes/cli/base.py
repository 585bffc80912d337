"""`trimtab base`: make base policies where none can be downloaded, for Meta-World or a benchmark's tasks."""

import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from trimtab.adapters import UserError
from trimtab.recipes.embedded_base.base import DEFAULT_TASKS, BaseConfig, make_base
from trimtab.recipes.embedded_base.suites import make_task_base, suite_tasks
from trimtab.recipes.support.shared_configs import MachineConfig
from trimtab.rl.envs.metaworld import task_names

METAWORLD = "metaworld"


@dataclass
class MakeBaseConfig(BaseConfig):
    """``trimtab base``."""

    # metaworld makes one base for all --tasks; gym_mujoco, robosuite, ogbench and arm one for each.
    suite: str = METAWORLD
    # Tasks, separated by commas; `--list_tasks=true` prints the suite's. Default: all; of Meta-World five.
    tasks: str = ""
    list_tasks: bool = False
    # Folder for the policy; demonstrations/ and base.json go beside its files. Of a benchmark's suite: where
    # these folders go, by the tasks' names; what is there is kept. Default: outputs/base/...
    output_dir: Path | None = None
    # Threads of torch; default: all cores.
    threads: int | None = None


def main(config: MakeBaseConfig) -> None:
    if config.suite != METAWORLD:
        make_suite(config)
        return
    if config.list_tasks:
        print("\n".join(task_names()))
        return
    options = {field.name: getattr(config, field.name) for field in fields(BaseConfig)}
    base = BaseConfig(**options | {"tasks": config.tasks or DEFAULT_TASKS}).resolved()
    folder = config.output_dir
    if folder is None:
        folder = Path("outputs") / "base" / f"metaworld-{base.key()}"
    if folder.exists():
        raise UserError("--output_dir", f"{folder} exists; name another or remove it")
    MachineConfig(workers=0, threads=config.threads).apply()
    made = make_base(base, folder)
    for task, rate in made["demonstration_success"].items():
        count = made["demonstrators"][task].get("episodes") or base.episodes
        print(f"{task:<32} demonstrators succeeded in {100 * rate:.0f} % of {count}")
    say_made(folder, made, f"--env.type=metaworld_state --env.task={base.tasks.split(',')[0]}")


def make_suite(config: MakeBaseConfig) -> None:
    """A base for each task, but for those that are there."""
    tasks = suite_tasks(config.suite)
    if config.list_tasks:
        print("\n".join(tasks))
        return
    default = MakeBaseConfig()
    for name in ("demonstrators", "episode_length"):
        if getattr(config, name) != getattr(default, name):
            raise UserError(f"--{name}", f"is Meta-World's; {config.suite} has its own")
    names = [name.strip() for name in config.tasks.split(",") if name.strip()] or list(tasks)
    for name in names:
        if name not in tasks:
            raise UserError("--tasks", f"{config.suite} has no task '{name}'; choose from {', '.join(tasks)}")
    replace(BaseConfig(), episodes=config.episodes, cloning=config.cloning, seed=config.seed).resolved()
    MachineConfig(workers=0, threads=config.threads).apply()
    for name in names:
        folder = (config.output_dir or Path("outputs") / "base" / config.suite) / name
        if folder.exists():
            print(f"{folder} is there already")
            continue
        made = make_task_base(tasks[name], name, folder, config.episodes, config.cloning, config.seed)
        print(f"{name}: demonstrators' mean {made['demonstrated']:.4g} in {made['episodes']} episodes")
        options = (shlex.quote(f"--env.{key}={value}") for key, value in tasks[name].env.items())
        say_made(folder, made, " ".join(options))


def say_made(folder: Path, made: dict[str, Any], env: str) -> None:
    """Where the base is, and how to try it."""
    print(
        f"\nbase policy in {folder} ({made['parameters']:,} parameters). Try it:\n"
        f"  trimtab eval --policy.path={folder} {env}"
    )
