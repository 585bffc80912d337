"""`trimtab base`: make an embedded base policy for any set of Meta-World's tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trimtab.adapters import UserError
from trimtab.recipes.embedded_base.base import BaseConfig, make_base
from trimtab.recipes.support.shared_configs import MachineConfig
from trimtab.rl.envs.metaworld import task_names


@dataclass
class MakeBaseConfig(BaseConfig):
    """``trimtab base``."""

    # Print the 50 task names and stop.
    list_tasks: bool = False
    # Folder for the policy; demonstrations/ and base.json go beside its files.
    output_dir: Path | None = None
    # Threads of torch; default: all cores.
    threads: int | None = None


def main(config: MakeBaseConfig) -> None:
    if config.list_tasks:
        print("\n".join(task_names()))
        return
    base = config.resolved()
    folder = config.output_dir
    if folder is None:
        folder = Path("outputs") / "base" / f"metaworld-{base.key()}"
    if folder.exists():
        raise UserError("--output_dir", f"{folder} exists; name another or remove it")
    MachineConfig(workers=0, threads=config.threads).apply()
    made = make_base(base, folder)
    for task, rate in made["demonstration_success"].items():
        print(f"{task:<32} demonstrators succeeded in {100 * rate:.0f} % of {base.episodes}")
    task = base.tasks.split(",")[0]
    print(
        f"\nbase policy in {folder} ({made['parameters']:,} parameters). Try it:\n"
        f"  trimtab eval --policy.path={folder} --env.type=metaworld_state --env.task={task}"
    )
