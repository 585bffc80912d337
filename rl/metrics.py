"""What a training run reports: outcomes of its last episodes, figures of its updates, where time went."""

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.rl.algorithms.base import Algorithm
from trimtab.rl.collector import Episode
from trimtab.rl.runs.processes import ProcessGroup

WINDOW = 50  # episodes in the running success rate
# Shares of the wall-clock in which one waits for another: the seconds that each is made of.
SHARES = {"learner_waits": "env_wait", "envs_wait": "env_idle", "denoise": "denoise"}


class RunMetrics:
    """Collects what the lines of ``metrics.jsonl`` say.

    Attributes:
        successes: of the last episodes, by task; of all under the name "".
        returns: the environment's own undiscounted returns of the last episodes.
        reported: whether an environment has reported success or failure so far.
        sums: of what the updates since the last line reported, by name: the sum, and of how many.
    """

    def __init__(self, world: ProcessGroup, tasks: Sequence[str]) -> None:
        self.world = world
        names = ["", *tasks] if len(tasks) > 1 else [""]
        self.successes: dict[str, deque[bool]] = {name: deque(maxlen=WINDOW) for name in names}
        self.returns: deque[float] = deque(maxlen=WINDOW)
        self.reported = False
        self.sums: dict[str, Sequence[Tensor]] = {}

    def add_update(self, metrics: dict[str, Tensor]) -> None:
        """Note what an update reported, without the figures of a step left out for NaN or Inf."""
        for name, value in metrics.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + value.nan_to_num(0.0, 0.0, 0.0), count + value.isfinite().int()

    def add_episode(self, task: str, success: bool, total: float) -> None:
        """Note the outcome of an episode, and what the environment paid in it."""
        self.returns.append(total)
        for name in {"", task} & self.successes.keys():
            self.successes[name].append(success)

    def outcome(self) -> str:
        """The success rate, or without one the return, for a progress bar."""
        last = self.successes[""]
        told = f"success {rate(last):.2f}" if self.reported else f"return {rate(self.returns):.4g}"
        return f"{told} (last {len(last)})"

    def rates(self) -> dict[str, Any]:
        """Success rates and returns of the last episodes."""
        line: dict[str, Any] = {
            "success_rate": rate(self.successes[""]) if self.reported else None,
            "return_mean": rate(self.returns) if self.returns else None,
            "success_window": len(self.successes[""]),
        }
        return line | {f"success_rate/{task}": rate(last) for task, last in self.successes.items() if task}

    def means(self) -> dict[str, float]:
        """What the updates since the last call reported, averaged over them and the processes."""
        here = {name: (float(total), int(count)) for name, (total, count) in self.sums.items()}
        self.sums = {}
        everyone = self.world.gather(here)
        line = {}
        for name in here:
            totals, counts = zip(*(there[name] for there in everyone if name in there), strict=True)
            if any(counts):
                line[name] = sum(totals) / sum(counts)
        return line

    def times(self, seconds: dict[str, float], elapsed: float) -> dict[str, float]:
        """Seconds by part of the loop on this process, and the ``SHARES`` averaged over the processes."""
        parts = dict(SHARES)
        if self.world.size > 1:
            seconds = {**seconds, "processes_wait": self.world.waited}
            parts["processes_wait"] = "processes_wait"
        line = {f"seconds_{name}": round(value, 3) for name, value in seconds.items()}
        line["seconds_total"] = round(elapsed, 3)
        shares = self.world.gather([seconds[name] / max(elapsed, 1e-9) for name in parts.values()])
        means = np.mean(shares, axis=0)
        return line | {
            f"seconds_share/{name}": round(float(s), 4) for name, s in zip(parts, means, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        names = ("successes", "returns", "reported", "sums")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, last in state["successes"].items():
            self.successes[name].extend(last)
        self.returns.extend(state["returns"])
        self.reported, self.sums = state["reported"], state["sums"]


def rate(last: Collection[float]) -> float:
    """The mean of ``last``; 0 of nothing."""
    return sum(last) / len(last) if last else 0.0


def returns_to_go(episode: Episode, tail: float) -> np.ndarray:
    """Discounted return from each chunk of a finished episode, (chunks,).

    ``tail`` is the value of what follows the last chunk, used where the episode did not terminate.
    """
    returns = np.zeros(len(episode.rewards))
    following = tail
    for index in reversed(range(len(returns))):
        following = episode.rewards[index] + episode.discounts[index] * following
        returns[index] = following
    return returns


def human_chunks(episodes: Collection[Episode]) -> dict[str, int]:
    """How many chunks people executed where these are to be imitated, and how many had a noise."""
    human, inverted = (sum(getattr(one, name) for one in episodes) for name in ("human", "inverted"))
    return {"human_chunks": human, "human_chunks_inverted": inverted} if human else {}


@torch.no_grad()
def calibration(algorithm: Algorithm, episodes: Collection[Episode]) -> dict[str, float]:
    """How the present critic's values of what recent episodes did compare with the returns that followed.

    An episode cut off by the time limit is continued with the critic's own value of its last chunk, so it
    says little about the bias.

    Returns:
        ``calibration_bias`` (mean of value - return), ``calibration_rmse`` and ``calibration_correlation``
        (Pearson); empty where there is nothing to compare.
    """
    if not episodes:
        return {}
    values, returns = [], []
    device = next(algorithm.parameters()).device
    for episode in episodes:
        seen = (episode.features, episode.u, episode.chunks)
        values.append(algorithm.value(*(torch.as_tensor(array).to(device) for array in seen)).cpu().numpy())
        returns.append(returns_to_go(episode, float(values[-1][-1])))
    value, target = np.concatenate(values), np.concatenate(returns)
    error = value - target
    out = {
        "calibration_bias": float(error.mean()),
        "calibration_rmse": float(np.sqrt(np.square(error).mean())),
    }
    if value.std() > 0 and target.std() > 0:
        out["calibration_correlation"] = float(np.corrcoef(value, target)[0, 1])
    return out
