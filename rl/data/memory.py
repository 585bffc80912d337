"""What the replay keeps for an algorithm, and whether the machine has the memory."""

import math

import numpy as np
import torch
from torch import Tensor

from trimtab.adapters import PolicyAdapter, UserError
from trimtab.adapters.memory import available_memory
from trimtab.policies.acting import Candidates
from trimtab.policies.noise_space import NoiseSpace
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.data.decoder import ConditioningSpec
from trimtab.rl.data.replay import Layout, entries_bytes
from trimtab.rl.runner import Encoded

# Features (d,) of an observation, and what else is kept of it by name.
Row = tuple[np.ndarray, dict[str, np.ndarray]]


def replay_layout(
    rl: AlgorithmConfig,
    adapter: PolicyAdapter,
    space: NoiseSpace,
    feature_dim: int,
    spec: ConditioningSpec | None = None,
) -> Layout:
    """What a transition of a run consists of, with observations of ``feature_dim`` numbers.

    ``rl.replayed`` names what else there is: ``chunk`` (what was executed), ``candidates`` and
    ``candidates_u`` (pairs of the state), the same with ``next_``, ``conditioning`` (of both states), and
    ``imitated`` (1 where ``u`` is the noise of what a person did).
    """
    size = math.prod(adapter.chunk_shape)
    shapes: dict[str, tuple[int, ...]] = {"chunk": (size,), "imitated": (1,)}
    for before in ("", "next_"):
        shapes[f"{before}candidates"] = (rl.candidates, size)
        shapes[f"{before}candidates_u"] = (rl.candidates, space.dim)
    extra = {name: (shapes[name], torch.float16) for name in rl.replayed if name != "conditioning"}
    pixels = adapter.observer.config.pixels if adapter.observer else 0
    return Layout(feature_dim, space.dim, extra | (spec.replayed if spec else {}), pixels)


def observation_rows(
    features: Tensor, candidates: Candidates | None, conditioning: Encoded, spec: ConditioningSpec | None
) -> list[Row]:
    """What the replay keeps of B observations."""
    kept: list[dict[str, np.ndarray]] = [{} for _ in features]
    if candidates is not None:
        chunks, u = candidates.chunks.flatten(2).cpu().numpy(), candidates.u.float().cpu().numpy()
        kept = [{"candidates": chunks[i], "candidates_u": u[i]} for i in range(len(kept))]
    if spec is not None:
        for i, row in enumerate(kept):
            row |= spec.row(conditioning, i)  # type: ignore[arg-type]
    return list(zip(features.cpu().numpy(), kept, strict=True))


def check_replay(capacity: int, layout: Layout) -> str:
    """One line about the memory that a replay of ``capacity`` transitions takes once it is full.

    Raises:
        UserError: more than the machine has.
    """
    each = entries_bytes(layout.entries) + layout.pixels  # a frame counts once: two transitions share it
    free, total = available_memory(), each * capacity
    if total > free:
        raise UserError(
            "--train.replay_capacity",
            f"{capacity:,} transitions of {each:,} bytes take {total / 2**20:,.0f} MiB, this machine has "
            f"{free / 2**20:,.0f} MiB left; lower it to {max(1, int(0.8 * free / each)):,} or less",
        )
    return f"replay: {capacity:,} transitions of {each:,} bytes, {total / 2**20:,.0f} MiB when full"
