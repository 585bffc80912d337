"""What a training run reports: outcomes of its last episodes, figures of its updates, where time went."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.rl.runs.faults import FaultLog
from trimtab.rl.runs.processes import ProcessGroup, count_outcomes, list_outcomes

WINDOW = 50  # episodes in the running success rate


class SuccessWindow:
    """Success rate over the last ``size`` episodes."""

    def __init__(self, size: int) -> None:
        self.recent: deque[bool] = deque(maxlen=size)

    def add(self, success: bool) -> None:
        self.recent.append(success)

    @property
    def rate(self) -> float:
        return float(np.mean(self.recent)) if self.recent else 0.0

    def __len__(self) -> int:
        return len(self.recent)


class RunMetrics:
    """Collects what the lines of ``metrics.jsonl`` say.

    Args:
        world: the processes of the run.
        tasks: names of its tasks.

    Attributes:
        windows: success of the last episodes, by task; of all under the name "".
        returns: the environment's own undiscounted returns of the last episodes.
        reported: whether an environment has reported success or failure so far.
        sums, counts: of what the updates since the last line reported, by name.
    """

    def __init__(self, world: ProcessGroup, tasks: Sequence[str]) -> None:
        self.world, self.tasks = world, list(tasks)
        names = ["", *self.tasks] if len(self.tasks) > 1 else [""]
        self.windows = {name: SuccessWindow(WINDOW) for name in names}
        self.returns: deque[float] = deque(maxlen=WINDOW)
        self.reported = False
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add_update(self, metrics: dict[str, Tensor]) -> None:
        """Note what an update reported, without the figures of a step left out for NaN or Inf."""
        for name, value in metrics.items():
            finite = torch.isfinite(value)
            self.sums[name] = self.sums.get(name, 0.0) + torch.where(finite, value, torch.zeros_like(value))
            self.counts[name] = self.counts.get(name, 0) + finite.int()

    def exchange(
        self, here: dict[str, float], outcomes: list[tuple[int, bool, bool]], faults: FaultLog
    ) -> tuple[dict[str, float], list[tuple[int, bool, bool]]]:
        """Add up what a chunk has brought to each process.

        Args:
            here: numbers of this process.
            outcomes: of its episodes: task, whether steered, whether a success.
            faults: its faults, which count for all from here on.

        Returns:
            (the numbers of all processes, their outcomes)
        """
        new = faults.take()
        numbers = self.world.sum([*map(float, here.values()), *new, *count_outcomes(outcomes, self.tasks)])
        end = len(here) + len(new)
        faults.put(numbers[len(here) : end])
        if self.world.size > 1:
            outcomes = list_outcomes(numbers[end:])
        return dict(zip(here, numbers, strict=False)), outcomes

    def add_returns(self, returns: list[float], totals: dict[str, float], count: int) -> None:
        """Note the returns of ``count`` episodes of all processes; of the others only the sum is known."""
        self.reported |= totals["reported"] > 0
        alone = self.world.size == 1
        self.returns.extend(returns if alone else [totals["returns"] / max(count, 1)] * count)

    def add_episode(self, task: int, success: bool) -> None:
        """Note the outcome of an episode of the task with this index."""
        self.windows[""].add(success)
        if len(self.tasks) > 1:
            self.windows[self.tasks[task]].add(success)

    @property
    def mean_return(self) -> float:
        """Mean of the environment's own undiscounted return over the last episodes."""
        return sum(self.returns) / len(self.returns)

    def outcome(self) -> str:
        """The success rate, or without one the return, for a progress bar."""
        window = self.windows[""]
        told = f"success {window.rate:.2f}" if self.reported else f"return {self.mean_return:.4g}"
        return f"{told} (last {len(window)})"

    def rates(self) -> dict[str, Any]:
        """Success rates and returns of the last episodes."""
        line: dict[str, Any] = {
            "success_rate": self.windows[""].rate if self.reported else None,
            "return_mean": self.mean_return if self.returns else None,
            "success_window": len(self.windows[""]),
        }
        return line | {f"success_rate/{task}": w.rate for task, w in self.windows.items() if task}

    def means(self) -> dict[str, float]:
        """What the updates since the last call reported, averaged over them and the processes."""
        names = sorted(self.sums) if self.world.size > 1 else list(self.sums)
        numbers = [float(self.sums[name]) for name in names] + [float(self.counts[name]) for name in names]
        numbers = self.world.sum(numbers)
        self.sums, self.counts = {}, {}
        pairs = zip(names, numbers[: len(names)], numbers[len(names) :], strict=True)
        return {name: total / count for name, total, count in pairs if count}

    def times(self, seconds: dict[str, float], elapsed: float) -> dict[str, float]:
        """Seconds by part of the loop, and the shares of the wall-clock in which one waited for another.

        Args:
            seconds: of this process.
            elapsed: since the run began.
        """
        parts = {"learner_waits": "env_wait", "envs_wait": "env_idle", "denoise": "denoise"}
        if self.world.size > 1:
            seconds = {**seconds, "processes_wait": self.world.waited}
            parts["processes_wait"] = "processes_wait"
        line = {f"seconds_{name}": round(value, 3) for name, value in seconds.items()}
        line["seconds_total"] = round(elapsed, 3)
        shares = self.world.sum([seconds[name] / max(elapsed, 1e-9) for name in parts.values()])
        pairs = zip(parts, shares, strict=True)
        return line | {f"seconds_share/{name}": round(s / self.world.size, 4) for name, s in pairs}

    def state_dict(self) -> dict[str, Any]:
        """What all processes share; ``sums`` and ``counts`` are each one's own."""
        windows = {name: list(window.recent) for name, window in self.windows.items()}
        return {"windows": windows, "returns": list(self.returns), "reported": self.reported}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, recent in state["windows"].items():
            self.windows[name].recent.extend(recent)
        self.returns.extend(state["returns"])
        self.reported = state["reported"]
