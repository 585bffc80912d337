"""What a task is judged by: success, or the undiscounted return where the environment reports no success."""

import statistics
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from trimtab.recipes.support.reporting import rate_text, return_text
from trimtab.rl.statistics import bootstrap_interval, mcnemar, paired_difference, wilson_interval

Summary = dict[str, Any]


class Measure:
    """Success: its rate with the 95 % Wilson interval.

    Attributes:
        name: of it, and of its place in an entry of compare.json.
        mean: what a summary calls its mean.
        outcomes: what a record calls those of the episodes, in the order of the seeds.
        level_names: what a table says of each level: environment steps ...
    """

    name, mean, outcomes = "success", "success_rate", "won"
    level_names: ClassVar[dict[str, str]] = {level: f"to {level} %" for level in ("50", "80", "90")}

    def values(self, summary: Summary) -> np.ndarray:
        """Each episode's outcome, (N,) float64; empty where they were not kept."""
        return np.array([float(outcome) for outcome in summary.get(self.outcomes) or ()])

    def pool(self, summaries: Sequence[Summary]) -> dict[str, Any]:
        """All episodes of several evaluations as one summary with its 95 % interval."""
        won, of = (sum(summary[name] for summary in summaries) for name in ("successes", "episodes"))
        low, high = wilson_interval(won, of)
        return {"successes": won, "episodes": of, "success_rate": won / of, "ci95": [low, high]}

    def against(self, base: Summary, summaries: Sequence[Summary]) -> dict[str, Any] | None:
        """How much better than ``base`` each seed is on the same episodes; ``None``: they cannot be paired.

        Returns:
            ``difference`` of the means, of all seeds together, and ``by_seed``; its ``ci95``; of success only
            with one seed (seeds share the base's episodes, so that together they are not independent), and
            beside it ``p`` of McNemar's exact test for each seed.
        """
        before, *after = (self.values(one) for one in (base, *summaries))
        if not len(before) or any(len(values) != len(before) for values in after):
            return None
        by_seed = [float((values - before).mean()) for values in after]
        return {"difference": statistics.fmean(by_seed), "by_seed": by_seed, **self._tests(before, after)}

    def _tests(self, before: np.ndarray, after: Sequence[np.ndarray]) -> dict[str, Any]:
        limits = list(paired_difference(before, after[0])[1:]) if len(after) == 1 else None
        return {"ci95": limits, "p": [mcnemar(before, values) for values in after]}

    def reaches(self, level: str, base: Summary | None, summary: Summary) -> bool:
        """Whether an evaluation has reached a level; ``base`` is all that is known of the base."""
        return summary["successes"] >= int(level) / 100 * summary["episodes"]

    def text(self, summary: Summary) -> str:
        """The mean with interval and counts."""
        return rate_text(summary)

    def change(self, value: float, unit: bool = True) -> str:
        """A difference of means."""
        return f"{100 * value:+.1f}" + " points" * unit


class Return(Measure):
    """The mean of the episodes' undiscounted returns, with its 95 % bootstrap interval over episodes."""

    name, mean, outcomes = "return", "return_mean", "returns"
    level_names: ClassVar[dict[str, str]] = {"base": "until it stays above the base"}

    def pool(self, summaries: Sequence[Summary]) -> dict[str, Any]:
        values = np.concatenate([self.values(one) for one in summaries])
        of = sum(one["episodes"] for one in summaries)
        mean = sum(one["return_mean"] * one["episodes"] for one in summaries) / of
        limits = list(bootstrap_interval(values)) if len(values) == of else None
        return {"episodes": of, "return_mean": mean, "return_ci95": limits}

    def _tests(self, before: np.ndarray, after: Sequence[np.ndarray]) -> dict[str, Any]:
        return {"ci95": list(bootstrap_interval(np.mean(after, axis=0) - before))}

    def reaches(self, level: str, base: Summary | None, summary: Summary) -> bool:
        return bool(base and base["return_ci95"]) and summary["return_mean"] > base["return_ci95"][1]

    def text(self, summary: Summary) -> str:
        return f"{return_text(summary)} ({summary['episodes']})"

    def change(self, value: float, unit: bool = True) -> str:
        return f"{value:+.4g}"


SUCCESS, RETURN = Measure(), Return()
MEASURES = {measure.name: measure for measure in (SUCCESS, RETURN)}


def count_unreported(runs: Sequence[dict[str, Any]]) -> None:
    """Where one evaluation of a task reported success, one that did not had none: some environments report
    it in the step that succeeds alone.
    """
    by_task: dict[str, list[Summary]] = {}
    for run in runs:
        by_task.setdefault(run["task"], []).extend(_evaluations(run))
        for others in ("others", "base_elsewhere"):
            for task, found in (run.get(others) or {}).items():
                by_task.setdefault(task, []).extend(found.values())
    for every in by_task.values():
        if any(one["success_rate"] is not None for one in every):
            for one in every:
                if one["success_rate"] is None:
                    one |= SUCCESS.pool([{"successes": 0, "episodes": one["episodes"]}])
                    one["won"] = "0" * one["episodes"]


def _evaluations(run: dict[str, Any]) -> list[Summary]:
    points = [point[name] for point in run["points"] for name in run["final"]]
    return [*run["final"].values(), *points]


def measure_of(runs: Sequence[dict[str, Any]]) -> Measure:
    """What the runs of one task are judged by: success where every evaluation reports it."""
    every = [one for run in runs for one in _evaluations(run)]
    return SUCCESS if all(one["success_rate"] is not None for one in every) else RETURN


def measure_in(entry: dict[str, Any]) -> Measure:
    """What an entry of compare.json is judged by."""
    return MEASURES[entry.get("measure", SUCCESS.name)]
