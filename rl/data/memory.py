"""How much memory the replay takes, and whether the machine has it."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import psutil

from trimtab.adapters import PolicyAdapter, UserError
from trimtab.policies.noise_space import NoiseSpace
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.data.decoder import ConditioningSpec
from trimtab.rl.data.replay import transition_bytes

# What a container may use and uses, in the two versions of Linux control groups.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_memory() -> int:
    """Bytes that this process can still take: of the machine, or of its container where that has less."""
    free = psutil.virtual_memory().available
    for limit, used in CGROUPS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    return max(free, 0)


def replay_extra(
    rl: AlgorithmConfig, chunk_size: int, dim: int, spec: ConditioningSpec | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of what the replay keeps for an algorithm beside the transition, by name.

    Args:
        rl: names it in ``replayed``: ``chunk`` (what was executed), ``candidates`` and ``candidates_u``
            (pairs of the state), the same with ``next_``, and ``conditioning`` (of both states).
        chunk_size: numbers in a chunk, steps * action_dim.
        dim: of the noise space.
        spec: of the conditioning, where it is kept.
    """
    shapes: dict[str, tuple[int, ...]] = {"chunk": (chunk_size,)}
    for before in ("", "next_"):
        shapes[f"{before}candidates"] = (rl.candidates, chunk_size)
        shapes[f"{before}candidates_u"] = (rl.candidates, dim)
    kept = {name: shapes[name] for name in rl.replayed if name != "conditioning"}
    return kept | (spec.replayed if spec else {})


def replay_layout(
    rl: AlgorithmConfig,
    adapter: PolicyAdapter,
    space: NoiseSpace,
    feature_dim: int,
    spec: ConditioningSpec | None,
) -> dict[str, Any]:
    """Arguments of ``ReplayBuffer`` and ``check_replay`` that say what a transition of a run consists of.

    Args:
        rl, adapter, space: of the run.
        feature_dim: length of an observation as the learner sees it.
        spec: of the conditioning, where it is kept.
    """
    steps, action_dim = adapter.chunk_shape
    return {
        "feature_dim": feature_dim,
        "action_dim": space.dim,
        "extra": replay_extra(rl, steps * action_dim, space.dim, spec),
        "precise": spec.replayed if spec else (),
        "pixels": adapter.observer.config.pixels if adapter.observer else 0,
    }


def check_replay(
    capacity: int,
    feature_dim: int,
    action_dim: int,
    extra: dict[str, tuple[int, ...]] | None = None,
    precise: Container[str] = (),
    pixels: int = 0,
) -> str:
    """One line about the memory that a replay takes once it is full.

    Args:
        capacity: transitions, of all processes on this machine.
        feature_dim, action_dim, extra, precise, pixels: as for ``ReplayBuffer``.

    Raises:
        UserError: more than the machine has.
    """
    each = transition_bytes(feature_dim, action_dim, extra, precise, pixels)
    free = available_memory()
    total = each * capacity
    if total > free:
        raise UserError(
            "--train.replay_capacity",
            f"{capacity:,} transitions of {each:,} bytes take {total / 2**20:,.0f} MiB, this machine has "
            f"{free / 2**20:,.0f} MiB left; lower it to {max(1, int(0.8 * free / each)):,} or less",
        )
    return f"replay: {capacity:,} transitions of {each:,} bytes, {total / 2**20:,.0f} MiB when full"
