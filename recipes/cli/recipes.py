"""`trimtab recipes`: the recipes that come with trimtab, what they need, and where their files lie.

Imports nothing heavy, so that the list is instant.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "configs"
ADAPT, LORA = "adapt.yaml", "lora.yaml"
COMPARE = "compare.yaml"  # where the two imply another comparison than the recipe makes
BASE = "base.yaml"  # where the base is made on the spot
ABOUT = "recipe"  # the part of a file that is about the recipe: ``type`` of its policy, what it ``needs``


@dataclass(frozen=True)
class Recipe:
    """A folder with README.md, adapt.yaml and lora.yaml."""

    name: str

    def read(self, file: str) -> dict[str, Any]:
        """The content of ``adapt.yaml`` or ``lora.yaml``."""
        return _read(FOLDER / self.name / file)

    @property
    def policy_type(self) -> str:
        """LeRobot's name of the policy's type, or ``remote`` for a policy on a server."""
        return self.read(ADAPT)[ABOUT]["type"]

    @property
    def checkpoint(self) -> str:
        """Folder, Hub repository or address of the base policy."""
        return self.read(ADAPT)["policy"]["path"]

    def row(self) -> tuple[str, ...]:
        content, environment = self.read(ADAPT), "yours"
        if env := content.get("env"):
            task = f"task {env['task_ids'][0]}" if env.get("task_ids") else ""
            environment = " ".join(filter(None, (env["type"], env.get("task"), task)))
        return self.name, self.policy_type, self.checkpoint, environment, content[ABOUT]["needs"]


RECIPES = {path.parent.name: Recipe(path.parent.name) for path in sorted(FOLDER.glob(f"*/{LORA}"))}


@cache
def _read(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


USAGE = """usage: trimtab recipes [NAME]

Without NAME, lists the recipes; with it, prints where the files of one lie, and its commands.
"""

DESCRIBED = """{}: {}, {}, in {}
needs {}

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
    widths = [*(max(map(len, column)) for column in list(zip(*rows))[:-1]), 0]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)


def described(recipe: Recipe) -> str:
    """Where the files of a recipe lie, and its commands."""
    given = "" if "env" in recipe.read(ADAPT) else " --env.discover_packages_path=YOURS --env.type=YOURS"
    config = f"--config_path={recipe.name}{given}"
    return DESCRIBED.format(*recipe.row(), folder=FOLDER / recipe.name, config=config)


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
