"""`trimtab recipes`: the recipes that come with trimtab, what they need, and where their files lie.

Imports nothing heavy, so that the list is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "configs"
ADAPT, LORA = "adapt.yaml", "lora.yaml"
COMPARE = "compare.yaml"  # where the two imply another comparison than the recipe makes


@dataclass(frozen=True)
class Recipe:
    """A folder with README.md, adapt.yaml and lora.yaml.

    Attributes:
        name: of the folder.
        policy_type: LeRobot's name, or ``remote`` for a policy on a server.
        needs: in short; the README says more, and where the numbers come from.
        lora_type: type of the policy that lora.yaml fine-tunes, where that is another one.
    """

    name: str
    policy_type: str
    needs: str
    lora_type: str = ""

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    def read(self, file: str) -> dict[str, Any]:
        """The options in ``adapt.yaml`` or ``lora.yaml``."""
        import yaml

        return yaml.safe_load((self.folder / file).read_text(encoding="utf-8"))

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
        where = [env["type"], env.get("task") or "", f"task {ids[0]}" if ids else ""]
        return " ".join(part for part in where if part)


# Sizes of weights: the parameters that `trimtab policies` counts, times the bytes of their precision.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("metaworld", "diffusion", "2 CPU cores; no download"),
        Recipe("diffusion_pusht", "diffusion", "GPU; weights 1.1 GB in float32"),
        Recipe("smolvla_libero", "smolvla", "GPU, LIBERO; weights 1.8 GB in float32"),
        Recipe("pi0_libero", "pi0", "GPU, LIBERO; weights 8.1 GB in bfloat16"),
        Recipe("pi05_libero", "pi05", "GPU, LIBERO; weights 8.3 GB in bfloat16"),
        Recipe("groot_libero", "groot", "GPU, LIBERO; weights 6.3 GB in bfloat16"),
        Recipe("xvla_libero", "xvla", "GPU, LIBERO; weights 3.5 GB in float32"),
        Recipe("multi_task_dit_metaworld", "multi_task_dit", "GPU, a checkpoint that you train"),
        Recipe("openpi_droid", "remote", "a GPU of 8 GB or more at the server; your robot", "pi05"),
        Recipe("your_policy", "diffusion", "what your policy needs"),
    )
}

USAGE = """usage: trimtab recipes [NAME]

Without NAME, lists the recipes; with it, prints where the files of one lie, and its commands.
"""


def config_of(name: str, command: str) -> Path | None:
    """The file that ``--config_path=name`` stands for, where ``name`` is no file but names a recipe.

    Args:
        name: a recipe's name, or ``recipes/configs/NAME/FILE`` wherever the command is run.
        command: that is going to read it; ``lora`` has a file of its own, ``compare`` may have one.
    """
    if name in RECIPES:
        own = {"lora": LORA, "compare": COMPARE}.get(command, ADAPT)
        path = FOLDER / name / own
        return path if path.is_file() else path.with_name(ADAPT)
    parts = Path(name).parts
    if parts[:2] == ("recipes", "configs") and len(parts) == 4 and parts[2] in RECIPES:
        path = FOLDER.joinpath(*parts[2:])
        return path if path.is_file() else None
    return None


def type_of(checkpoint: str) -> str | None:
    """The type of a recipe's checkpoint, by its name; ``None`` of any other."""
    for recipe in RECIPES.values():
        if recipe.read(ADAPT)["policy"]["path"] == checkpoint:
            return recipe.policy_type
        if recipe.read(LORA)["policy"]["path"] == checkpoint:
            return recipe.lora_type or recipe.policy_type
    return None


def listing() -> str:
    """All recipes, as an aligned table."""
    rows = [("recipe", "type", "checkpoint", "environment", "needs")]
    rows += [(r.name, r.policy_type, r.checkpoint, r.environment, r.needs) for r in RECIPES.values()]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + "  " + row[4] for row in rows
    )


def described(recipe: Recipe) -> str:
    """Where the files of a recipe lie, and its commands."""
    given = "" if "env" in recipe.read(ADAPT) else " --env.discover_packages_path=YOURS --env.type=YOURS"
    here = f"  trimtab %s --config_path={recipe.name}{given}"
    lines = [
        f"{recipe.name}: {recipe.policy_type}, {recipe.checkpoint}, in {recipe.environment}",
        f"needs {recipe.needs}",
        "",
        *(str(recipe.folder / name) for name in ("README.md", ADAPT, LORA)),
        "",
        here % "probe",
        here % "adapt" + " --output_dir=outputs/steered",
        here % "eval" + " --policy.path=outputs/steered/artefact",
        "  trimtab export --run=outputs/steered",
        here % "lora",
        here % "compare" + " --output_dir=outputs/compared",
        "",
        "With --tiny=true each runs anywhere, on a random tiny policy of that type, in well under a minute.",
    ]
    return "\n".join(lines)


def main(args: Sequence[str]) -> int:
    """Print the list, or one recipe; return the exit code."""
    if any(arg in ("-h", "--help") for arg in args):
        print(USAGE, end="")
        return 0
    if not args:
        print(listing())
        print("\n`trimtab recipes NAME` prints its files and commands.")
        return 0
    if len(args) > 1 or args[0] not in RECIPES:
        wrong = args[1] if len(args) > 1 else args[0]
        message = f"no recipe '{wrong}'; there are {', '.join(RECIPES)}"
        print(f"trimtab recipes: error: {message}", file=sys.stderr)
        return 2
    print(described(RECIPES[args[0]]))
    return 0
