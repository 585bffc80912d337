"""What goes wrong in a long run, counted by kind; and signals that stop it in an orderly way.

``crash`` and ``hang`` are a simulator's; ``observation``, ``reward``, ``chunk``, ``transition`` and ``loss``
held NaN or Inf; an ``unrepeatable`` episode did not go as it had gone, when a run was resumed.
"""

from __future__ import annotations

import os
import signal
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from trimtab.adapters.errors import UserError, at_least


@dataclass
class FaultsConfig:
    """``--faults.*``: how much may go wrong before a run stops."""

    # Number of faults after which the run stops with a checkpoint: simulators that crash or hang, NaN or Inf.
    limit: int = 50
    # Seconds that a simulator worker may take for one chunk before it is restarted (0: any time).
    timeout: float = 300.0

    def __post_init__(self) -> None:
        at_least(0, self, "--faults.", "limit", "timeout")


class Faults(Counter[str]):
    """How many there have been in all processes, by kind.

    Attributes:
        limit: more than so many end the run.
        new: those here since the last ``gather``: kind, and what is said of it, after its option.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.new, self._last = limit, list[tuple[str, str]](), ""

    def gather(self, world: Any, guard: Any) -> None:
        """Count what is new in all of a ``ProcessGroup``, and the steps that a ``StepGuard`` has left out."""
        everyone = world.gather([*self.new, *guard.taken()])
        self.new = []
        for kind, self._last in (fault for there in everyone for fault in there):
            self[kind] += 1

    @property
    def too_many(self) -> bool:
        return self.total() > self.limit

    def check(self) -> None:
        """Raise a ``UserError`` about the last one where there have been too many."""
        if self.too_many:
            option, _, message = self._last.partition(": ")
            listed = ", ".join(f"{count} x {kind}" for kind, count in self.items())
            count = f"stopped after {self.total()} faults ({listed}), more than --faults.limit={self.limit}"
            raise UserError(option, f"{message}; {count}")


class Stopped(BaseException):
    """A signal ended the run after its checkpoint was written.

    Attributes:
        name: of the signal.
        env_steps: where its newest checkpoint stands; ``None`` after training.
    """

    def __init__(self, name: str, env_steps: int | None = None) -> None:
        super().__init__(name, env_steps)
        self.name, self.env_steps = name, env_steps


def stopping() -> list[int]:
    """The signals that stop what runs; not that of a lost terminal where ``nohup`` has put it aside."""
    heard: list[int] = [signal.SIGTERM, signal.SIGINT]
    lost = getattr(signal, "SIGHUP", None)  # not on Windows
    return heard if lost is None or signal.getsignal(lost) == signal.SIG_IGN else [*heard, lost]


def leave_terminal(number: int) -> None:
    """After SIGHUP the terminal is gone, and whatever is still said to it would raise: let go of it."""
    if number == getattr(signal, "SIGHUP", None):
        for output in (1, 2):
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), output)


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP as a wish to stop, from ``with`` to its end.

    While ``deferred`` is set, a signal is noted in ``name`` and the loop stops at its next whole chunk; a
    second SIGINT interrupts at once. Otherwise a signal interrupts at once: with ``Stopped`` where ``kept``
    says that there is a checkpoint, else with ``KeyboardInterrupt``.
    """

    def __init__(self) -> None:
        self.name = ""
        self.deferred = self.kept = False

    def __call__(self) -> bool:
        """Whether the loop should stop."""
        return bool(self.name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        leave_terminal(number)
        again = self.name == name == "SIGINT"
        self.name = name
        if self.deferred and not again:
            return
        raise Stopped(name) if self.kept and not again else KeyboardInterrupt

    @contextmanager
    def installed(self) -> Iterator[StopSignals]:
        """Take the signals over; outside the main thread, where Python forbids that, leave them."""
        try:
            before = {number: signal.signal(number, self._handle) for number in stopping()}
        except ValueError:
            before = {}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def lost_notes(lost: int, repeatable: bool) -> list[str]:
    """A line about ``lost`` running episodes that could not be taken up, if any."""
    if not lost:
        return []
    ending = "s" * (lost != 1)
    if not repeatable:
        return [
            f"{lost} interrupted episode{ending} dropped, new ones begin: this environment cannot repeat them"
        ]
    fickle = "did not repeat exactly and start anew: this simulator is not deterministic"
    return [f"{lost} running episode{ending} {fickle}"] if lost else []
