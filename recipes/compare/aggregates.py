"""A comparison over all tasks and seeds, by rliable (Agarwal et al., arXiv 2108.13264)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trimtab.recipes.compare.measure import RETURN, Measure, measure_of

LEAST_TASKS, LEAST_SEEDS = 2, 3  # either is enough
RESAMPLES = 2000
ROUNDING = 1e-9  # of a mean over seeds
Run = dict[str, Any]
Matrix = dict[tuple[str, str], list[list[Run]]]  # by method and policy: tasks, and of each its seeds


def aggregate(runs: Sequence[Run], improved: str, reach: str) -> list[dict[str, Any]]:
    """One entry per method and policy with the same seeds on all tasks; none of too few tasks and seeds.

    Args:
        runs: records, as for ``summarise``.
        improved: the method whose probability of improvement over each other is told.
        reach: the method whose final level the others are to reach, if any.

    Returns:
        ``iqm``: inter-quartile mean of the scores (success rate, or the return divided by the base's mean);
        ``improvement``: probability that a run of ``improved`` scores higher, mean over the tasks; ``share``:
        median over tasks and seeds of the steps to the final level of ``reach``, as a share of its steps
        (``None``: never), and how many have ``reached`` it. Each with ``..._ci95``, by stratified bootstrap
        over seeds.

    Raises:
        ValueError: there are no scores, or no rliable.
    """
    matrix = table(runs)
    sizes = [(len(tasks), len(tasks[0])) for tasks in matrix.values()]
    if not any(tasks >= LEAST_TASKS or seeds >= LEAST_SEEDS for tasks, seeds in sizes):
        return []
    measures, bases = by_task(runs), {run["task"]: run for run in runs if run["method"] == "base"}

    def score(run: Run, policy: str) -> float:
        measure = measures[run["task"]]
        value = run["final"][policy][measure.mean]
        return value / positive(bases.get(run["task"]), run["task"]) if measure is RETURN else value

    scores = {
        key: np.array([[score(run, key[1]) for run in task] for task in tasks]).T
        for key, tasks in matrix.items()
    }
    best = next((key for key in scores if key[0] == improved and key[1] != "acting"), None)
    shares = steps_to_reach(matrix, measures, bases, reach) if reach else {}
    entries = []
    for (method, policy), found in scores.items():
        entry = {"method": method, "policy": policy, "has_acting": (method, "acting") in scores}
        entry |= {"seeds": found.shape[0], "tasks": found.shape[1]}
        entry |= {"improved": improved if best else "", "reach": reach if shares else ""}
        entry["iqm"], entry["iqm_ci95"] = interval([found], "aggregate_iqm")
        if best and method != improved:
            pair = interval([scores[best], found], "probability_of_improvement")
            entry["improvement"], entry["improvement_ci95"] = pair
        entries.append(entry | shares.get((method, policy), {}))
    return entries


def table(runs: Sequence[Run]) -> Matrix:
    """The runs of each method and policy on all tasks, of the seeds that all tasks have."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    found: Matrix = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = {(run["task"], run["seed"]): run for run in runs if run["method"] == method}
        seeds = [
            seed for seed in dict.fromkeys(seed for _, seed in mine) if all((t, seed) in mine for t in tasks)
        ]
        rows = [[mine[task, seed] for seed in seeds] for task in tasks]
        for policy in rows[0][0]["final"] if seeds else ():
            found[method, policy] = rows
    return found


def by_task(runs: Sequence[Run]) -> dict[str, Measure]:
    """What each task is judged by."""
    tasks = dict.fromkeys(run["task"] for run in runs)
    return {task: measure_of([run for run in runs if run["task"] == task]) for task in tasks}


def positive(base: Run | None, task: str) -> float:
    """The base's mean return, of which scores are multiples."""
    value = base["final"]["policy"]["return_mean"] if base else None
    if value is None or value <= 0:
        raise ValueError(f"scores are multiples of the base's mean return, on {task} it is {value}")
    return value


def interval(scores: list[np.ndarray], metric: str) -> tuple[float, list[float] | None]:
    """A metric of rliable on matrices (seeds, tasks), and its 95 % interval where there are seeds."""
    try:
        from rliable import library, metrics
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; install it: pip install 'lerobot_policy_trimtab[compare]'") from None
    function = getattr(metrics, metric)
    value = float(function(*scores))
    if max(len(one) for one in scores) < 2:
        return value, None
    state = np.random.get_state()
    np.random.seed(0)  # rliable draws from NumPy's own generator, whatever random_state it is given
    _, found = library.get_interval_estimates(
        {"": scores[0] if len(scores) == 1 else tuple(scores)},
        lambda *drawn: np.array([function(*drawn)]),
        reps=RESAMPLES,
    )
    np.random.set_state(state)
    return value, [float(limit) for limit in found[""][:, 0]]


def steps_to_reach(
    matrix: Matrix, measures: dict[str, Measure], bases: dict[str, Run], reach: str
) -> dict[tuple[str, str], dict[str, Any]]:
    """How soon each other method with a curve is where ``reach`` ends: see ``aggregate``.

    That is the mean of its last evaluations over its seeds, task by task. A run is there at its first
    evaluation that is as high; without a step of its own where the base already is.
    """
    curves = {key: tasks for key, tasks in matrix.items() if all(run["episodes"] for t in tasks for run in t)}
    target = next((key for key in curves if key[0] == reach and key[1] != "acting"), None)

    def share(run: Run, policy: str, goal: list[Run]) -> float:
        mean = measures[run["task"]].mean
        level = np.mean([one["points"][-1][target[1]][mean] for one in goal]) - ROUNDING
        base = bases.get(run["task"], {"points": []})
        starts = ({"grid": 0, policy: point["policy"]} for point in base["points"])
        there = (point["grid"] for point in (*starts, *run["points"]) if point[policy][mean] >= level)
        return next(there, math.inf) / goal[0]["points"][-1]["grid"]

    found = {}
    for key, tasks in curves.items() if target else ():
        if key[0] == reach:
            continue
        pairs = zip(tasks, matrix[target], strict=True)
        shares = np.array([[share(run, key[1], goal) for run in task] for task, goal in pairs])
        draws = np.random.default_rng(0).integers(shares.shape[1], size=(RESAMPLES, *shares.shape))
        medians = np.median(np.take_along_axis(shares[None], draws, 2), axis=(1, 2))
        limits = np.quantile(medians, [0.025, 0.975], method="inverted_cdf")  # some may be infinite
        middle, *ci95 = (None if math.isinf(v) else float(v) for v in (np.median(shares), *limits))
        found[key] = {"share": middle, "share_ci95": ci95, "reached": int(np.isfinite(shares).sum())}
    return found
