"""`trimtab recipes`: the recipes that come with trimtab, what they need, and where their files lie.

Imports nothing heavy, so that the list is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "configs"
ADAPT, LORA = "adapt.yaml", "lora.yaml"
COMPARE = "compare.yaml"  # where the two imply another comparison than the recipe makes
ABOUT = "recipe"  # the part of a file that is about the recipe: ``type`` of its policy, what it ``needs``


@dataclass(frozen=True)
class Recipe:
    """A folder with README.md, adapt.yaml and lora.yaml."""

    name: str

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    def read(self, file: str) -> dict[str, Any]:
        """The content of ``adapt.yaml`` or ``lora.yaml``."""
        return deepcopy(_read(self.folder / file))

    @property
    def policy_type(self) -> str:
        """LeRobot's name of the policy's type, or ``remote`` for a policy on a server."""
        return self.read(ADAPT)[ABOUT]["type"]

    @property
    def checkpoint(self) -> str:
        """Folder, Hub repository or address of the base policy."""
        return self.read(ADAPT)["policy"]["path"]

    @property
    def environment(self) -> str:
        env = self.read(ADAPT).get("env")
        if env is None:
            return "yours"
        ids = env.get("task_ids")
        return " ".join(filter(None, (env["type"], env.get("task"), f"task {ids[0]}" if ids else "")))

    def row(self) -> tuple[str, ...]:
        needs = self.read(ADAPT)[ABOUT]["needs"]
        return self.name, self.policy_type, self.checkpoint, self.environment, needs


RECIPES = {path.parent.name: Recipe(path.parent.name) for path in sorted(FOLDER.glob(f"*/{ADAPT}"))}


@cache
def _read(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


USAGE = """usage: trimtab recipes [NAME]

Without NAME, lists the recipes; with it, prints where the files of one lie, and its commands.
"""

DESCRIBED = """{name}: {type}, {checkpoint}, in {environment}
needs {needs}

{folder}/README.md
{folder}/adapt.yaml
{folder}/lora.yaml

  trimtab probe {config}
  trimtab adapt {config} --output_dir=outputs/steered
  trimtab eval {config} --policy.path=outputs/steered/artefact
  trimtab export --run=outputs/steered
  trimtab lora {config}
  trimtab compare {config} --output_dir=outputs/compared

With --tiny=true each runs anywhere, on a random tiny policy of that type, in well under a minute."""


def config_of(name: str, command: str) -> Path | None:
    """The file that ``--config_path=name`` stands for, where ``name`` is no file but names a recipe.

    Args:
        name: a recipe's name, or ``recipes/configs/NAME/FILE`` wherever the command is run.
        command: that is going to read it; ``lora`` has a file of its own, ``compare`` may have one.
    """
    if name in RECIPES:
        path = FOLDER / name / {"lora": LORA, "compare": COMPARE}.get(command, ADAPT)
        return path if path.is_file() else path.with_name(ADAPT)
    parts = Path(name).parts
    path = FOLDER.joinpath(*parts[2:])
    known = parts[:2] == ("recipes", "configs") and len(parts) == 4 and parts[2] in RECIPES
    return path if known and path.is_file() else None


def type_of(checkpoint: str) -> str | None:
    """The type of a recipe's checkpoint, by its name; ``None`` of any other."""
    for recipe in RECIPES.values():
        for file in (ADAPT, LORA):
            content = recipe.read(file)
            if content["policy"]["path"] == checkpoint:
                return content.get(ABOUT, recipe.read(ADAPT)[ABOUT])["type"]
    return None


def listing() -> str:
    """All recipes, as an aligned table."""
    rows = [("recipe", "type", "checkpoint", "environment", "needs"), *(r.row() for r in RECIPES.values())]
    widths = [*(max(len(row[i]) for row in rows) for i in range(4)), 0]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)


def described(recipe: Recipe) -> str:
    """Where the files of a recipe lie, and its commands."""
    given = "" if "env" in recipe.read(ADAPT) else " --env.discover_packages_path=YOURS --env.type=YOURS"
    names = ("name", "type", "checkpoint", "environment", "needs")
    config = f"--config_path={recipe.name}{given}"
    return DESCRIBED.format(**dict(zip(names, recipe.row())), folder=recipe.folder, config=config)


def main(args: Sequence[str]) -> int:
    """Print the list, or one recipe; return the exit code."""
    if any(arg in ("-h", "--help") for arg in args):
        print(USAGE, end="")
    elif not args:
        print(f"{listing()}\n\n`trimtab recipes NAME` prints its files and commands.")
    elif len(args) == 1 and args[0] in RECIPES:
        print(described(RECIPES[args[0]]))
    else:
        wrong = args[min(1, len(args) - 1)]
        print(f"trimtab recipes: error: no recipe '{wrong}'; there are {', '.join(RECIPES)}", file=sys.stderr)
        return 2
    return 0
