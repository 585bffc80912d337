"""The `trimtab` command. Heavy imports wait until a command runs, so that help is instant."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": (
        "trimtab.recipes.cli.demo",
        "make a base policy, steer it, and compare: all in minutes",
    ),
    "adapt": ("trimtab.recipes.cli.adapt", "steer a LeRobot policy in an environment by noise-space RL"),
    "eval": (
        "trimtab.recipes.cli.eval",
        "compare base, zero noise, constant noise and steered on paired seeds",
    ),
    "export": (
        "trimtab.recipes.cli.export",
        "a run as a LeRobot policy, with a model card; to the Hub",
    ),
    "lora": (
        "trimtab.recipes.cli.lora",
        "the rival: fine-tune by LoRA on a dataset, or on the policy's successes",
    ),
    "compare": (
        "trimtab.recipes.cli.compare",
        "steering beside LoRA and other rivals: table, figure, HTML report",
    ),
    "probe": ("trimtab.recipes.cli.probe", "can this policy be steered, and in which noise space?"),
    "policies": ("trimtab.recipes.cli.policies", "table of the policy types: their noise, and what it costs"),
    "recipes": ("trimtab.recipes.cli.recipes", "the recipes for known generalists: files, commands, needs"),
    "bench": ("trimtab.recipes.cli.bench", "sample efficiency and engine speed beside other methods"),
    "base": ("trimtab.recipes.cli.base", "make an embedded base policy for any of Meta-World's 50 tasks"),
}
LEARN = ("adapt", "demo", "lora", "compare", "bench")  # these take part in what a launcher has begun
LIGHT = ("recipes",)  # these need no policy and say themselves what is wrong

USAGE = """usage: trimtab COMMAND [--option=value ...]

Steer a frozen LeRobot policy by learning which noise to feed it.

commands:
{commands}

Options are LeRobot's: --policy.path=, --env.type=, --env.task=, --config_path=; any field can be set.
`trimtab COMMAND --help` lists the options of a command.
"""


def usage() -> str:
    """The text of `trimtab --help`."""
    return USAGE.format(commands="\n".join(f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, or 2 where the user can mend what went wrong."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if args[0] not in COMMANDS:
        print(f"trimtab: error: no command '{args[0]}'; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if args[0] in LIGHT:
        return importlib.import_module(COMMANDS[args[0]][0]).main(args[1:])
    return _run(COMMANDS[args[0]][0], args[0], args[1:])


def _run(module: str, command: str, args: list[str]) -> int:
    from trimtab.recipes.support.console import quiet, start_worker_server
    from trimtab.rl.runs.threads import spin_briefly

    spin_briefly()  # before torch is imported
    quiet()
    if not {"-h", "--help"} & set(args):
        start_worker_server()
    from trimtab.adapters.errors import UserError

    try:
        from trimtab.recipes.support.launched import check_launch
        from trimtab.recipes.support.recipe_file import with_recipe
        from trimtab.recipes.support.tiny_run import tiny

        run: Callable[[list[str]], None] = importlib.import_module(module).main
        if command in LEARN:
            check_launch()
        with tiny(with_recipe(args, command), command) as arguments:
            run(arguments)
    except UserError as error:
        rank = os.environ.get("RANK", "0")  # of an `accelerate launch`
        where = "" if rank == "0" else f" (process {rank})"
        print(f"\ntrimtab {command}{where}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ntrimtab {command}: interrupted", file=sys.stderr)
        return 130
    return 0
