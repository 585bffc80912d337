"""How much memory the replay takes, and whether the machine has it."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import psutil

from trimtab.adapters import UserError
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
