"""The memory that a policy's weights take, and what the machine has."""

from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from torch import Tensor

from trimtab.adapters.errors import policy_error

LARGE = 2**30  # bytes of weights from which a line is worth it
# What a container may use, uses, and keeps of files that it can let go of, in the two versions of Linux
# control groups.
CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory() -> int:
    """Bytes that this process can still take: of the machine, or of its container where that has less."""
    free = psutil.virtual_memory().available
    for folder, limit, used, files in CGROUPS:
        try:
            most, now = (int((Path(folder) / name).read_text()) for name in (limit, used))
            stat = dict(line.split() for line in (Path(folder) / "memory.stat").read_text().splitlines())
            free = min(free, most - now + int(stat.get(files, 0)))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    return max(free, 0)


def check_weights(saved: Mapping[str, Tensor], dtype: str | None, device: str) -> str | None:
    """One line about the memory that weights take, where they are large, on their way and on ``device``.

    Args:
        saved: the weights; their values are not read.
        dtype: that they will have; ``None``: as saved.
        device: they pass through this machine's memory on their way to it.

    Raises:
        UserError: there is less.
    """
    size = sum(t.numel() * (getattr(torch, dtype) if dtype else t.dtype).itemsize for t in saved.values())
    free = {"this machine": available_memory()}
    if torch.device(device).type == "cuda":
        free[device] = torch.cuda.mem_get_info(device)[0]
    precision = dtype or ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in saved.values()}))
    takes = f"{size / 2**20:,.0f} MiB in {precision}"
    for where, left in free.items():
        if size > left:
            raise policy_error(
                f"its weights take {takes}, {where} has {left / 2**20:,.0f} MiB left; free some, or take "
                "another --policy.dtype or --policy.device"
            )
    if size < LARGE:
        return None
    has = ", ".join(f"{where} has {left / 2**20:,.0f} MiB left" for where, left in free.items())
    return f"weights: {takes}; {has}"
