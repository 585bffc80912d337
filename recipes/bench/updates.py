"""What an update of each algorithm costs beside one of `dsrl_sac`, in float32 and in bfloat16."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trimtab.adapters import NoiseSpec
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.recipes.bench.clock import CPU, clock_of, unit_of
from trimtab.recipes.bench.report import median_and_range
from trimtab.rl.algorithms import (
    Algorithm,
    AlgorithmConfig,
    BestOfNConfig,
    DSRLNAConfig,
    DSRLSACConfig,
    Problem,
)
from trimtab.rl.algorithms.base import RANKED_EVERY
from trimtab.rl.data.returns import value_bounds

STEPS, ACTION_DIM, FEATURES = 8, 4, 39  # those of the embedded base
ALGORITHMS: dict[str, type[AlgorithmConfig]] = {
    "dsrl_sac": DSRLSACConfig,
    "dsrl_na": DSRLNAConfig,
    "best_of_n": BestOfNConfig,
}
BESIDE = "dsrl_sac"


def endings(device: torch.device) -> dict[str, dict[str, str]]:
    """Precision and engine by the end of a name (none, ``_bf16``); on a GPU also with ``_graph``."""
    engines = {"": "eager"} | ({"_graph": "cuda_graph"} if device.type == "cuda" else {})
    return {
        half + graph: {"precision": precision, "engine": engine}
        for half, precision in (("", "float32"), ("_bf16", "bfloat16"))
        for graph, engine in engines.items()
    }


def make_batch(
    config: AlgorithmConfig, generator: torch.Generator, device: torch.device = CPU
) -> dict[str, Tensor]:
    """Random transitions: what an update costs does not depend on what is in them."""
    size, dim = config.batch_size, STEPS * ACTION_DIM

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch = {"reward": -draw(size).abs(), "discount": torch.full((size,), 0.9), "u": draw(size, dim).tanh()}
    for before in ("", "next_"):
        batch[f"{before}features"] = draw(size, FEATURES)
        if config.candidates:
            batch[f"{before}candidates"] = draw(size, config.candidates, dim)
            batch[f"{before}candidates_u"] = draw(size, config.candidates, dim).tanh()
    batch["chunk"] = draw(size, dim)
    return {name: value.to(device) for name, value in batch.items()}


def make_learner(
    make_config: type[AlgorithmConfig], hidden: int, device: torch.device = CPU, **settings: Any
) -> Algorithm:
    """An algorithm with its defaults but for ``settings``, at this width."""
    torch.manual_seed(0)
    config = make_config(actor=ActorConfig(hidden=hidden), critic=CriticConfig(hidden=hidden), **settings)
    space = FullNoiseConfig().build(NoiseSpec((STEPS, ACTION_DIM)))
    bounds = value_bounds("sparse", config.gamma, config.discount_per, STEPS)
    accelerator = Accelerator(cpu=device.type == "cpu")
    return config.build(Problem(FEATURES, space, accelerator, bounds, STEPS * ACTION_DIM))


def milliseconds(learner: Algorithm, batch: dict[str, Tensor], updates: int) -> float:
    """By the clock of the batch's device (``clock.py``), per update."""
    clock = clock_of(batch["reward"].device)
    started = clock()
    for _ in range(updates):
        learner.update(batch)
    return 1e3 * (clock() - started) / updates


def take_turns(
    learners: dict[str, Algorithm], batches: dict[str, dict[str, Tensor]], repetitions: int, updates: int
) -> dict[str, list[float]]:
    """``milliseconds`` of each learner on its batch, one for each turn; every second turn goes backwards."""
    taken: dict[str, list[float]] = {name: [] for name in learners}
    for turn in range(repetitions):
        for name in learners if turn % 2 == 0 else reversed(learners):
            taken[name].append(milliseconds(learners[name], batches[name], updates))
    return taken


def measure_updates(
    hidden: int, repetitions: int, updates: int, device: torch.device = CPU
) -> dict[str, Any]:
    """Let the algorithms take turns, each in both precisions, on a GPU also recorded as CUDA graphs.

    Returns:
        by name (``dsrl_sac``, ``dsrl_sac_bf16``, ...): ``ms``, the median over the turns, and ``ratios``, of
        each turn, by ``dsrl_sac``'s in the same precision and engine; ``ratio``, their median.
    """
    generator = torch.Generator().manual_seed(0)
    learners, batches, beside_of = {}, {}, {}
    for name, make_config in ALGORITHMS.items():
        for ending, settings in endings(device).items():
            learner = make_learner(make_config, hidden, device, **settings)
            batch = make_batch(learner.config, generator, device)
            learners[name + ending], batches[name + ending] = learner, batch
            beside_of[name + ending] = BESIDE + ending
            milliseconds(learner, batch, 4 if device.type == "cpu" else 4 * RANKED_EVERY)
    taken = take_turns(learners, batches, repetitions, updates)
    found: dict[str, Any] = {}
    for name, times in taken.items():
        beside = taken[beside_of[name]]
        ratios = [own / other for own, other in zip(times, beside, strict=True)]
        found[name] = {
            "ms": round(statistics.median(times), 3),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    return found


def run_updates(
    widths: Sequence[int], repetitions: int, updates: int, device: torch.device = CPU
) -> dict[str, Any]:
    """``measure_updates`` for each width; whole rounds of what is measured now and then in an update."""
    updates = -(-updates // RANKED_EVERY) * RANKED_EVERY
    return {str(width): measure_updates(width, repetitions, updates, device) for width in widths}


def updates_table(found: dict[str, Any], device: torch.device = CPU) -> str:
    """Markdown."""
    ms = f"ms of {unit_of(device)} per update"
    lines = [
        f"| width | algorithm | {ms} | by dsrl_sac's: median (range) of the turns |",
        "|---|---|---|---|",
    ]
    for width, rows in found.items():
        for name, row in rows.items():
            lines.append(f"| 3x{width} | `{name}` | {row['ms']:.2f} | {median_and_range(row)} |")
    return "\n".join(lines)
