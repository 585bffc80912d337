"""Several processes of one run: what a launcher lays out in the environment, and Accelerate makes of it.

A launcher tells each process its rank in variables. Templates of clusters export some of them for every job,
where a command that is started plainly finds them too.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from trimtab.adapters.errors import UserError, reason

COUNTS = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
NEEDED = ("WORLD_SIZE", "RANK", "MASTER_ADDR")  # by every process of several
NEEDED_ON_GPU = ("LOCAL_RANK", "MASTER_PORT")
SET = (*COUNTS, "MASTER_ADDR", "MASTER_PORT")
MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
MEND = "to run in one process, unset {}; in several: `accelerate launch -m trimtab.rl.train ...`"


def local_processes() -> int:
    """How many processes of an ``accelerate launch`` share this machine."""
    return _number("LOCAL_WORLD_SIZE") or 1


def launched_processes() -> int:
    """How many processes of an ``accelerate launch`` make up this run."""
    return _number("WORLD_SIZE") or 1


def check_launch(cpu: bool = True) -> None:
    """Refuse an environment that says half of what a launcher says to a run on the CPU, or on GPUs."""
    size, rank, _, local_rank = (_number(name) for name in COUNTS)
    if (size or 1) < 2 and not rank and local_rank is None:
        return
    there = [name for name in SET if os.environ.get(name)]
    missing = [name for name in (*NEEDED, *(() if cpu else NEEDED_ON_GPU)) if name not in there]
    mend = MEND.format(" ".join(there))
    if missing:
        values = ", ".join(f"{name}={os.environ[name]}" for name in there)
        lacks = " and no ".join(missing)
        raise UserError(
            there[0], f"the environment holds {values}, as a launcher sets it, but no {lacks}; {mend}"
        )
    if rank >= size:
        raise UserError("RANK", f"there is no process {rank} of WORLD_SIZE={size}; {mend}")


def _number(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise UserError(name, f"'{text}' in the environment is no number; {MEND.format(name)}")
    return int(text) if text else None


def make_accelerator(
    device: str | None, trackers: list[str] | None = None, folder: Path | None = None
) -> Any:
    """The accelerator of this process, for a base on ``device``; it takes up what a launcher has laid out.

    Raises:
        UserError: what the environment says of processes, or of Accelerate, cannot be.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    cpu = str(device).startswith("cpu") or not torch.cuda.is_available()
    check_launch(cpu)
    size, met = launched_processes(), torch.distributed.is_available() and torch.distributed.is_initialized()
    if size > 1 and not met and "TORCHELASTIC_RUN_ID" not in os.environ:  # started by hand, or left over
        print(
            f"process {os.environ['RANK']} of {size} waits for the others at {os.environ['MASTER_ADDR']}, as "
            "WORLD_SIZE, RANK and MASTER_ADDR in the environment say; unset them to run alone",
            file=sys.stderr,
        )
    names = [name for name in (*SET, *MPI) if os.environ.get(name)]
    names += sorted(name for name in os.environ if name.startswith("ACCELERATE_"))
    before = dict(os.environ)
    try:
        return Accelerator(
            cpu=cpu,
            mixed_precision="no",  # of base and learner each has an option; gradients are float32
            log_with=trackers or None,
            project_dir=folder if trackers else None,
            # environments may be slow, and of uneven speed
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
    except (ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        for name in os.environ.keys() - before.keys():  # Accelerate's own
            del os.environ[name]
        if not names:
            raise
        raise UserError(
            "accelerate",
            f"{reason(error, last=True)}; the environment sets {', '.join(names)}: unset what is left over "
            "from another job, or mend it",
        ) from error


def check_trackers(names: str | None) -> list[str]:
    """The trackers in a comma-separated list, each known to Accelerate and installed, or a ``UserError``."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, available = sorted(map(str, LOGGER_TYPE_TO_CLASS)), set(map(str, get_available_trackers()))
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise UserError("--trackers", f"'{name}' is none of {', '.join(known)}")
        if name not in available:
            raise UserError("--trackers", f"{name} is not installed: pip install {name}")
    return wanted


class Trackers:
    """Sends lines of metrics to an accelerator's trackers, and gives up on them at the first failure."""

    def __init__(self, accelerator: Any, config: dict[str, Any]) -> None:
        self.accelerator, self.live = accelerator, bool(accelerator.log_with)
        self._try(lambda: accelerator.init_trackers("trimtab", config))

    def __call__(self, line: dict[str, Any]) -> None:
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
        self._try(lambda: self.accelerator.log(numbers, step=line["env_steps"]))

    def close(self) -> None:
        self._try(self.accelerator.end_training)

    def _try(self, part: Callable[[], Any]) -> None:
        try:
            if self.live:
                part()
        except (Exception, SystemExit) as error:  # somebody else's code, and perhaps somebody else's network
            self.live = False
            print(f"no tracking from here on ({type(error).__name__}: {reason(error)}); the run goes on")
