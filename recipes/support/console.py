"""What all commands share at the console: quiet libraries, output folders, threads."""

import logging
import os
import sys
import warnings
from pathlib import Path

from trimtab.rl.runs.threads import threads_said

# What every simulator worker needs; LeRobot's part of it takes seconds to import.
WORKER_MODULES = ["trimtab.rl.envs.vector"]


def quiet() -> None:
    """Keep other libraries' notices off the console; errors still show."""
    for category in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if not sys.stderr.isatty():  # a log wants no bars
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in (None, "lerobot", "accelerate", "datasets", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def say(text: str) -> None:
    """Print on the first process of an ``accelerate launch``."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def start_worker_server() -> None:
    """Start the process that simulator workers are forked from, to import while this one imports."""
    import multiprocessing
    import multiprocessing.forkserver

    if sys.platform != "win32":
        multiprocessing.set_forkserver_preload(WORKER_MODULES)
        multiprocessing.forkserver.ensure_running()


def default_cache() -> Path:
    """Where made policies are kept: ``$TRIMTAB_CACHE``, else ``~/.cache/trimtab``."""
    return Path(os.environ.get("TRIMTAB_CACHE") or "~/.cache/trimtab").expanduser()


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
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UserError("--output_dir", f"{there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise UserError("--output_dir", f"cannot write to {there}")
    return path


def own_cores() -> int:
    """Cores of this process, where several share a machine; at least one."""
    from trimtab.recipes.support.launched import local_processes

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // local_processes())


def default_threads(workers: int) -> int:
    """Threads for torch beside ``workers`` simulator processes: as many as the environment says
    (``OMP_NUM_THREADS``), else this process's other cores, at least one.
    """
    said = threads_said()
    return said if said is not None else max(1, own_cores() - workers)
