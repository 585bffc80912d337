"""What `--rl.engine=compile` gains: updates per second, compiled and not, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from trimtab.recipes.bench.report import median_and_range
from trimtab.recipes.bench.updates import make_batch, make_learner, take_turns
from trimtab.rl.algorithms import AlgorithmConfig, BestOfNConfig, DSRLSACConfig

ENGINES = ("eager", "compile")


def measure(
    make_config: type[AlgorithmConfig], hidden: int, repetitions: int, updates: int
) -> dict[str, Any]:
    """Milliseconds of this process's CPU time per update, of each turn, and the ratios within a turn.

    Returns:
        ``eager_ms`` and ``compile_ms`` (medians), ``ratio`` (eager by compiled, median), ``ratios``, and
        ``first_seconds``: wall-clock of the first fifty updates compiled, in which compilation falls; and
        ``compiled``: whether it worked.
    """
    learners = {engine: make_learner(make_config, hidden, engine=engine) for engine in ENGINES}
    batch = make_batch(learners["eager"].config, torch.Generator().manual_seed(0))
    first = 0.0
    for learner in learners.values():
        started = time.perf_counter()
        for _ in range(51):  # every turn has come by once
            learner.update(batch)
        first = time.perf_counter() - started
    taken = take_turns(learners, dict.fromkeys(ENGINES, batch), repetitions, updates)
    ratios = [eager / compiled for eager, compiled in zip(taken["eager"], taken["compile"], strict=True)]
    return {
        **{f"{engine}_ms": round(statistics.median(taken[engine]), 3) for engine in ENGINES},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "first_seconds": round(first, 1),
        "compiled": learners["compile"]._engine.works,
    }


def run_compiled(widths: Sequence[int], repetitions: int, updates: int) -> dict[str, Any]:
    """``measure`` for each algorithm and width: ``{"dsrl_sac": {"128": ...}, ...}``."""
    algorithms = {"dsrl_sac": DSRLSACConfig, "best_of_n": BestOfNConfig}
    return {
        name: {str(width): measure(config, width, repetitions, updates) for width in widths}
        for name, config in algorithms.items()
    }


def compiled_table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| algorithm | width | eager, ms | compiled, ms | eager / compiled: median (range) | first 51, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, widths in found.items():
        for width, row in widths.items():
            spread = median_and_range(row) if row["compiled"] else "cannot be compiled here"
            lines.append(
                f"| `{name}` | 3x{width} | {row['eager_ms']:.2f} | {row['compile_ms']:.2f} | {spread} "
                f"| {row['first_seconds']:.0f} |"
            )
    return "\n".join(lines)
