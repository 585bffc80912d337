"""What goes wrong in a long run, counted; and signals that stop it in an orderly way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from trimtab.adapters.errors import UserError, at_least

# crash, hang: of a simulator. observation, reward, chunk, transition, loss: NaN or Inf in it.
# unrepeatable: an episode that did not go as it had gone, when a run was resumed.
KINDS = ("crash", "hang", "observation", "reward", "chunk", "transition", "loss", "unrepeatable")


@dataclass
class FaultsConfig:
    """``--faults.*``: how much may go wrong before a run stops."""

    # Number of faults after which the run stops with a checkpoint: simulators that crash or hang, NaN or Inf.
    limit: int = 50
    # Seconds that a simulator worker may take for one chunk before it is restarted (0: any time).
    timeout: float = 300.0

    def __post_init__(self) -> None:
        at_least(0, self, "--faults.", "limit", "timeout")


@dataclass
class FaultLog:
    """Counts faults of all processes.

    Attributes:
        counts: by kind, over the whole run.
        last: what happened last on this process.
    """

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    last: str = ""
    _new: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def add(self, kind: str, message: str, count: int = 1) -> None:
        """Note what happened here; it counts once ``take`` and ``put`` have been through."""
        self._new[kind] += count
        self.last = message

    def take(self) -> list[float]:
        """New faults of this process, by kind."""
        found = [float(self._new[kind]) for kind in KINDS]
        self._new = dict.fromkeys(KINDS, 0)
        return found

    def put(self, new: list[float]) -> None:
        """Count new faults of all processes."""
        for kind, count in zip(KINDS, new, strict=True):
            self.counts[kind] += int(count)

    def error(self, limit: int) -> UserError:
        """That there are more than ``limit``, with what happened last on this process."""
        option, _, message = (self.last or "--faults.limit: on another process").partition(": ")
        count = f"stopped after {self.total} faults ({self}), more than --faults.limit={limit}"
        return UserError(option, f"{message}; {count}")

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        return ", ".join(f"{count} x {kind}" for kind, count in self.counts.items() if count) or "none"


class Stopped(Exception):
    """A signal ended the run after its checkpoint was written.

    Args:
        name: of the signal.
        env_steps: where its newest checkpoint stands; ``None`` after training.
    """

    def __init__(self, name: str, env_steps: int | None = None) -> None:
        super().__init__(name, env_steps)
        self.name, self.env_steps = name, env_steps


class StopSignals:
    """SIGTERM and SIGINT as a wish to stop, from ``with`` to its end.

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
        again = self.name == name == "SIGINT"
        self.name = name
        if again:
            raise KeyboardInterrupt
        if self.deferred:
            return
        if self.kept:
            raise Stopped(name)
        raise KeyboardInterrupt

    @contextmanager
    def installed(self) -> Iterator[StopSignals]:
        """Take the signals over; outside the main thread, where Python forbids that, leave them."""
        try:
            before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            before = {}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def lost_notes(lost: int, repeatable: bool) -> list[str]:
    """A line about running episodes that could not be taken up, if any.

    Args:
        lost: how many.
        repeatable: whether the environments say that they repeat an episode.
    """
    if not repeatable:
        ending = "s" * (lost != 1)
        return [
            f"{lost} interrupted episode{ending} dropped, new ones begin: this environment cannot repeat them"
        ]
    if not lost:
        return []
    return [
        f"{lost} running episode{'s' * (lost > 1)} did not repeat exactly and start anew: "
        "this simulator is not deterministic"
    ]
