"""Progress for whoever waits: a bar on a terminal, in a log a line now and then."""

import sys
import time
from typing import Any

from tqdm import tqdm

EVERY = 60.0  # seconds between two lines of a log


class Progress(tqdm):
    """tqdm's bar; where stderr is no terminal, a line each ``EVERY`` seconds instead.

    A bar that stays (``leave``) has a last line there, too.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        self.plain = not sys.stderr.isatty()
        self._said = time.monotonic()
        super().__init__(*args, file=sys.stderr, dynamic_ncols=not self.plain, **named)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self.plain:
            return super().display(msg, pos)
        if time.monotonic() - self._said >= EVERY:
            self._line()
        return True

    def close(self) -> None:
        if not self.plain or self.disable:
            super().close()
            return
        if self.leave:
            self._line()
        self.delay = float("inf")  # so that tqdm clears nothing
        super().close()

    def _line(self) -> None:
        self._said = time.monotonic()
        known = self.format_dict
        rate = known["n"] / known["elapsed"] if known["elapsed"] else 0.0
        total = "" if self.total is None else f"/{self.total}"
        more = f", {self.postfix}" if self.postfix else ""
        print(f"{self.desc}: {self.n}{total}, {rate:.3g} {self.unit}/s{more}", file=self.fp, flush=True)
