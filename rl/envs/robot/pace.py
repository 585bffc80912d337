"""How punctual a robot was: late actions, gaps between chunks, the rate that was reached."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Pace:
    """Seconds that actions were late, and gaps between chunks, since the last ``take``."""

    late: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def take(self, period: float) -> dict[str, float]:
        """Quantiles in seconds; actions a second (Hz), gaps included, where one is due every ``period``."""
        found = {
            f"{name}_p{quantile}_s": float(np.percentile(values, quantile))
            for name, values in (("late", self.late), ("gap", self.gaps))
            for quantile in ((50, 95) if values else ())
        }
        if moving := len(self.late) * period:
            found["actions_hz"] = len(self.late) / (moving + sum(self.gaps))
        self.late, self.gaps = [], []
        return found
