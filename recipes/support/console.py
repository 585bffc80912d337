"""Parsing of options and quiet libraries: what all commands share at the console."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import warnings
from pathlib import Path

from trimtab.rl.runs.threads import threads_said

# What every simulator worker needs; LeRobot's part of it takes seconds to import.
WORKER_MODULES = ["trimtab.rl.envs.vector"]

# Commands that run on a random tiny policy too.
TINY = ("probe", "adapt", "eval", "export", "lora", "compare")
TINY_HELP = """
--tiny=true: a random tiny policy of the same type in the place of the checkpoint, in an environment that is
installed, with budgets of seconds (--tiny=TYPE says which type).
--config_path=FILE or the name of a recipe (`trimtab recipes`)."""


def quiet() -> None:
    """Keep other libraries' notices off the console; errors still show."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if not sys.stderr.isatty():  # a log wants no bars
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("lerobot", "accelerate", "datasets", "torch", "root"):
        logging.getLogger(None if name == "root" else name).setLevel(logging.ERROR)


def say(text: str) -> None:
    """Print on the first process of an ``accelerate launch``."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def start_worker_server() -> None:
    """Start the process that simulator workers are forked from, to import while this one imports."""
    import multiprocessing
    import multiprocessing.forkserver

    if sys.platform == "win32":
        return
    multiprocessing.set_forkserver_preload(WORKER_MODULES)
    multiprocessing.forkserver.ensure_running()


def parse[Config](config_class: type[Config], command: str, args: list[str]) -> Config:
    """Parse ``--option=value`` arguments, and a YAML or JSON file given as ``--config_path``.

    Raises:
        UserError: an unknown option or a value that does not fit, named.
        SystemExit: after printing help.
    """
    import draccus
    from draccus.utils import DecodingError, ParsingError
    from lerobot.configs import parser
    from lerobot.configs.parser import print_scoped_help

    from trimtab.adapters.errors import UserError
    from trimtab.recipes.support.recipe_file import file_options, fitted
    from trimtab.recipes.support.repeat import load_plugins

    config_path = _config_path(args)
    args = load_plugins(args, file_options(args))
    if "-h" in args or "--help" in args:
        print(f"usage: trimtab {command} [--option=value ...]")
        if command in TINY:
            print(TINY_HELP)
        print_scoped_help(config_class, args)
        raise SystemExit(0)
    if config_path and not _holds_options(config_path):
        raise UserError(f"--config_path={config_path}", "holds no options, such as `seed: 3`")
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), fitted(config_path, command, args) as path:
            return draccus.parse(config_class, path, args=parser.filter_arg("config_path", args))
    except UserError:
        raise
    except SystemExit:
        raise UserError(*_argparse_error(errors.getvalue(), command)) from None
    except DecodingError as error:
        if isinstance(error.__cause__, UserError):  # a config that checks its own fields
            raise error.__cause__ from None
        key = ".".join(str(part) for part in getattr(error, "key_path", ()))
        missing = _missing_field(str(error), key)
        if missing:
            raise UserError(*missing) from None
        option = f"--{key}" if key else (f"--config_path={config_path}" if config_path else "options")
        raise UserError(option, str(getattr(error, "message", error))) from None
    except (ParsingError, ValueError, TypeError, KeyError, OSError) as error:
        missing = _missing_type(str(error), args)
        if missing:
            raise UserError(*missing) from None
        where = f"--config_path={config_path}" if config_path else "options"
        raise UserError(where, str(error).strip() or type(error).__name__) from None
    except Exception as error:  # YAML scanner errors come in many classes
        where = f"--config_path={config_path}" if config_path else "options"
        raise UserError(where, f"cannot be read ({error})") from None


def _config_path(args: list[str]) -> str | None:
    from trimtab.adapters.errors import UserError

    for index, arg in enumerate(args):
        if arg.startswith("--config_path="):
            path = arg.split("=", 1)[1]
        elif arg == "--config_path" and index + 1 < len(args):
            path = args[index + 1]
        else:
            continue
        if not Path(path).is_file():
            raise UserError("--config_path", f"there is no file {path}")
        return path
    return None


def _holds_options(path: str) -> bool:
    """Whether a YAML or JSON file has the form of a config; one that cannot be read is left to the parser."""
    import yaml

    try:
        return isinstance(yaml.safe_load(Path(path).read_text(encoding="utf-8")), dict)
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return True


def _argparse_error(text: str, command: str) -> tuple[str, str]:
    line = next((part for part in reversed(text.strip().splitlines()) if "error:" in part), text.strip())
    message = line.split("error:", 1)[-1].strip()
    unknown = "unrecognized arguments:"
    if message.startswith(unknown):
        option = message.removeprefix(unknown).split()[0].split("=")[0]
        return option, f"no such option; `trimtab {command} --help` lists them"
    if message.startswith("argument "):
        option, _, rest = message.removeprefix("argument ").partition(":")
        return option.strip(), rest.strip()
    return "options", message or "cannot be parsed"


def _missing_field(message: str, key: str) -> tuple[str, str] | None:
    """draccus's message about a required field in the part ``key`` of the options, as the option to give."""
    found = re.search(r"Missing required field\(s\) `(\w+)", message)
    if found is None:
        return None
    name = f"{key}.{found[1]}" if key else found[1]
    if name == "env":
        return (
            "--env.type",
            "name the environment, for instance --env.type=metaworld_state or --env.type=pusht",
        )
    return f"--{name}", "this option is required"


def _missing_type(message: str, args: list[str]) -> tuple[str, str] | None:
    """draccus's message about fields of a group whose type is not named, as the option to give."""
    if "Expected a dict with a 'type' key" not in message:
        return None
    given = [arg.partition("=")[0] for arg in args]
    for option in given:
        group, _, name = option.partition(".")
        if f"'{name.partition('.')[0]}'" in message and f"{group}.type" not in given:
            return option, f"which options there are depends on {group}.type; name that too"
    return None


def new_output_dir(path: Path | None, default: str) -> Path:
    """The folder for a run's output: ``path``, or ``outputs/...`` with date and time, as in LeRobot.

    Raises:
        UserError: it exists and is not empty, or cannot be made.
    """
    import datetime as dt

    from trimtab.adapters.errors import UserError

    if path is None:
        path = Path("outputs") / default / f"{dt.datetime.now():%Y-%m-%d/%H-%M-%S}"
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError("--output_dir", f"{path} exists and is not empty; name another")
    probe = path
    while not probe.exists():
        probe = probe.parent
    if not probe.is_dir():
        raise UserError("--output_dir", f"{probe} is a file, not a folder")
    if not os.access(probe, os.W_OK):
        raise UserError("--output_dir", f"cannot write to {probe}")
    return path


def default_threads(workers: int) -> int:
    """Threads for torch beside ``workers`` simulator processes: as many as the environment says
    (``OMP_NUM_THREADS``), else this process's other cores, at least one.
    """
    from trimtab.recipes.support.launched import local_processes

    said = threads_said()
    if said is not None:
        return said
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // local_processes() - workers)
