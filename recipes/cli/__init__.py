"""The `trimtab` command. Heavy imports wait until a command runs, so that help is instant."""

import importlib
import os
import sys
import typing
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A command: its module here has a ``main`` that takes the config it declares."""

    text: str
    launched: bool = False  # takes part in what a launcher has begun
    tiny: bool = False  # also runs on a random tiny policy
    light: bool = False  # takes arguments in place of a config, and says itself what is wrong
    simulates: bool = True  # steps environments, by default in worker processes


COMMANDS = {
    "demo": Command("make a base policy, steer it, and compare, in minutes", launched=True),
    "adapt": Command("steer a LeRobot policy in an environment by noise-space RL", launched=True, tiny=True),
    "eval": Command("compare base, zero noise, constant noise and steered on the same episodes", tiny=True),
    "export": Command(
        "write a run as a LeRobot policy with a model card; push it to the Hub", tiny=True, simulates=False
    ),
    "lora": Command(
        "fine-tune instead: LoRA on a dataset, or on the policy's successes", launched=True, tiny=True
    ),
    "compare": Command(
        "steering beside LoRA and other methods: table, figure, HTML report", launched=True, tiny=True
    ),
    "probe": Command("can this policy be steered, and in which noise space?", tiny=True),
    "policies": Command("list the policy types: their noise, and what one more noise costs", simulates=False),
    "recipes": Command(
        "list the recipes for known policies: files, commands, needs", light=True, simulates=False
    ),
    "station": Command("run a robot for `trimtab adapt` on another machine", simulates=False),
    "base": Command("make base policies on the spot: Meta-World's tasks, or a benchmark's", simulates=False),
}
# What is gone ("COMMAND" or "COMMAND --option"), and what to use instead.
REMOVED: dict[str, str] = {
    "bench": "`trimtab compare` compares methods; timings are `python -m tests.benchmarks.NAME`",
    **dict.fromkeys(
        (f"policies --{name}" for name in ("full_size", "cameras", "time", "threads")),
        "`python -m tests.benchmarks.policies` counts and times",
    ),
}

USAGE = """usage: trimtab COMMAND [--option=value ...]

Steer a frozen LeRobot policy by learning which noise to feed it.

commands:
{commands}

Options are LeRobot's: --policy.path=, --env.type=, --env.task=, --config_path=; any field can be set.
`trimtab COMMAND --help` lists the options of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, or 2 where the user can mend what went wrong."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        lines = (f"  {name:<8} {command.text}" for name, command in COMMANDS.items())
        print(USAGE.format(commands="\n".join(lines)), end="")
        return 0
    name = args.pop(0)
    if name not in COMMANDS:
        said = f"is gone: {REMOVED[name]}" if name in REMOVED else f"there are {', '.join(COMMANDS)}"
        print(f"trimtab: error: no command '{name}'; {said}", file=sys.stderr)
        return 2
    try:
        code = entry(name)(args) if COMMANDS[name].light else _run(name, args)
        sys.stdout.flush()
    except BrokenPipeError:
        if COMMANDS[name].simulates:  # it may be a worker's
            raise
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # `trimtab recipes | head` has read enough
        return 0
    return code


def entry(command: str) -> Callable[..., Any]:
    """The function that runs a command."""
    return importlib.import_module(f"{__name__}.{command}").main


def config_class(command: str) -> type:
    """The dataclass of a command's options: what its function takes."""
    return typing.get_type_hints(entry(command))["config"]


def _run(command: str, args: list[str]) -> int:
    from trimtab.recipes.support.console import quiet, start_worker_server
    from trimtab.rl.rendering import choose_gl_backend
    from trimtab.rl.runs.imports import quick_imports
    from trimtab.rl.runs.threads import spin_briefly

    spin_briefly()  # before torch is imported
    choose_gl_backend()  # before a plugin imports a simulator
    quiet()
    no_workers = "-h", "--help", "--machine.workers=0", "--tiny", "--robot."
    if COMMANDS[command].simulates and not any(arg.startswith(no_workers) for arg in args):
        start_worker_server()
    with quick_imports():
        from trimtab.adapters.errors import DISK, UserError

        kind = config_class(command)

    config: Any = None
    try:
        from trimtab.recipes.support.launched import check_launch
        from trimtab.recipes.support.options import parse

        if COMMANDS[command].launched:
            check_launch()
        with ExitStack() as stack:
            config = parse(kind, command, args, stack)
            entry(command)(config)
    except UserError as error:
        if getattr(getattr(config, "env", None), "type", "") == "robot":
            from trimtab.recipes.support.robot_options import as_of_robot

            error = as_of_robot(error)
        rank = os.environ.get("RANK", "0")  # of an `accelerate launch`
        where = "" if rank == "0" else f" (process {rank})"
        print(f"\ntrimtab {command}{where}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"\ntrimtab {command}: error: {where}{error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ntrimtab {command}: interrupted", file=sys.stderr)
        return 130
    return 0
