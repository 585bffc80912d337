"""Make the embedded base policy: demonstrate, record, clone. It is made once, and then lies in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.adapters import UserError
from trimtab.adapters.checkpoint.files import whole_folder
from trimtab.recipes.embedded_base.cloning import CloningConfig, clone
from trimtab.recipes.embedded_base.demonstrations import REPO_ID, Operator, episodes_of, record
from trimtab.rl.envs.metaworld import (
    RECORD,
    MetaworldStateConfig,
    check_episode_length,
    resolve_task,
    split_tasks,
)

DEMONSTRATIONS = "demonstrations"
MAX_SEED = 400  # keeps the demonstrations' seeds below those of training

# How the mixture was chosen: recipes/configs/metaworld/README.md.
DEFAULT_TASKS = "button-press-topdown-v3,hammer-v3,drawer-open-v3,door-open-v3,window-close-v3"


def default_demonstrators() -> dict[str, Operator]:
    """The demonstrators of two of the default tasks; the other tasks get careful ones."""
    return {
        "button-press-topdown-v3": Operator("blind_spot", p_bad=0.5, offset=0.14),
        "hammer-v3": Operator("shift", p_bad=0.7, offset=0.05),
    }


@dataclass
class BaseConfig:
    """``trimtab base``: which generalist to make."""

    # Meta-World tasks, separated by commas; `--list_tasks=true` prints all 50.
    tasks: str = DEFAULT_TASKS
    # Who demonstrates which task, as YAML: '{hammer-v3: {kind: shift, p_bad: 0.7, offset: 0.05}}'.
    # A task that is not named is demonstrated with care.
    demonstrators: dict[str, Operator] = field(default_factory=default_demonstrators)
    # Demonstrations per task.
    episodes: int = 40
    # Time limit of a demonstration, in environment steps.
    episode_length: int = 160
    cloning: CloningConfig = field(default_factory=CloningConfig)
    seed: int = 0

    def resolved(self) -> BaseConfig:
        """The same with full task names, checked.

        Raises:
            UserError: an unknown task, a demonstrator for a task that is not made, a number out of range.
        """
        tasks = split_tasks(self.tasks, "--tasks")
        if len(set(tasks)) != len(tasks):
            raise UserError("--tasks", "a task is named twice")
        operators = {resolve_task(name, "--demonstrators"): op for name, op in self.demonstrators.items()}
        stray = [name for name in operators if name not in tasks]
        if stray and self.demonstrators != default_demonstrators():
            raise UserError("--demonstrators", f"{', '.join(stray)} is not among --tasks")
        if self.episodes < 1:
            raise UserError("--episodes", f"must be at least 1, got {self.episodes}")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError("--seed", f"must be between 0 and {MAX_SEED}, got {self.seed}")
        check_episode_length(self.episode_length, "--episode_length")
        self.cloning.check()
        named = {name: operator for name, operator in operators.items() if name in tasks}
        numbers = self.episodes, self.episode_length, self.cloning, self.seed
        return BaseConfig(",".join(tasks), named, *numbers)

    def key(self) -> str:
        """A short hash of everything that decides what the base is."""
        from importlib.metadata import version

        import lerobot
        import metaworld  # noqa: F401 - its version decides the demonstrations

        parts = {
            **asdict(self),
            "lerobot": lerobot.__version__,
            "metaworld": version("metaworld"),
            "recipe": 1,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()[:12]


def cached_base(config: BaseConfig, cache: Path) -> Path:
    """The folder of the base that ``config`` describes, made now if the cache lacks it."""
    config = config.resolved()
    folder = cache / f"metaworld-{config.key()}"
    if (folder / RECORD).is_file():
        print(f"base policy: {folder} (cached)")
        return folder
    try:
        make_base(config, folder, "--cache_dir")
    except FileExistsError:
        print(f"base policy: {folder} (another process made it meanwhile)")
    return folder


def make_base(config: BaseConfig, folder: Path, option: str = "--output_dir") -> dict[str, Any]:
    """Demonstrate, record and clone into ``folder``, which appears only when all of it is there.

    Returns:
        What ``base.json`` holds: tasks, operators, the demonstrators' success and the loss curve.

    Raises:
        UserError: ``option`` names a folder that cannot be written.
        FileExistsError: another process made ``folder`` meanwhile.
    """
    tasks = config.tasks.split(",")

    def demonstrate(root: Path) -> dict[str, Any]:
        operators = {task: replace(config.demonstrators.get(task, Operator())) for task in tasks}
        how = config.episodes, config.episode_length, config.seed
        shown = {task: episodes_of(task, operator, *how) for task, operator in operators.items()}
        total = sum(operator.episodes or config.episodes for operator in operators.values())
        rates = record(root, REPO_ID, MetaworldStateConfig().fps, shown, total)
        who = {task: asdict(operator) for task, operator in operators.items()}
        return {"demonstrators": who, "demonstration_success": rates}

    facts = {"tasks": tasks, "episodes_per_task": config.episodes, "episode_length": config.episode_length}
    return write_base(folder, demonstrate, config.cloning, config.seed, facts, option)


def write_base(
    folder: Path,
    demonstrate: Callable[[Path], dict[str, Any]],
    cloning: CloningConfig,
    seed: int,
    facts: dict[str, Any],
    option: str = "--output_dir",
    steps: tuple[Any, ...] = (),
) -> dict[str, Any]:
    """Clone what ``demonstrate`` records as a LeRobotDataset, whole or not at all, into ``folder``.

    ``steps``: processor steps that the base takes along, after its preprocessor's renaming.

    Returns:
        ``facts``, what ``demonstrate`` returns, and more, as ``base.json`` holds them.

    Raises:
        UserError: ``option`` names a folder that cannot be written.
        FileExistsError: another process made ``folder`` meanwhile.
    """
    import datasets
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    datasets.disable_progress_bars()
    with whole_folder(folder, option) as work:
        made = facts | demonstrate(work / DEMONSTRATIONS)
        dataset = LeRobotDataset(REPO_ID, root=work / DEMONSTRATIONS)
        policy, pre, post, losses = clone(dataset, cloning, seed)
        pre.steps[1:1] = steps
        for part in (policy, pre, post):  # as `lerobot-train` would
            part.save_pretrained(work)
        made |= {
            "frames": dataset.num_frames,
            "cloning": asdict(cloning),
            "seed": seed,
            "parameters": sum(p.numel() for p in policy.parameters()),
            "loss": losses,
        }
        (work / RECORD).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            raise FileExistsError(f"{folder} appeared while the base was being made")
    return made
