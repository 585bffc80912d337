"""A checkpoint of another number of processes, dealt anew among those of this run."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.rl.collector import Collector
from trimtab.rl.data.replay import ReplayBuffer
from trimtab.rl.runs.checkpoint import Checkpoint
from trimtab.rl.runs.processes import World


def weights_digest(module: nn.Module) -> str:
    """A hash of a module's weights and buffers."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def rng_state(device: torch.device) -> dict[str, Tensor | None]:
    """State of torch's own generators, of the CPU and of a GPU."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Tensor | None], device: torch.device) -> None:
    """The inverse of ``rng_state``."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def lost_notes(lost: int, repeatable: bool) -> list[str]:
    """A line about running episodes that could not be taken up, if any.

    Args:
        lost: how many.
        repeatable: whether the environments say that they repeat an episode.
    """
    if not repeatable:
        ending = "s" * (lost != 1)
        return [
            f"{lost} interrupted episode{ending} dropped, new ones begin: this environment cannot repeat them"
        ]
    if not lost:
        return []
    return [
        f"{lost} running episode{'s' * (lost > 1)} did not repeat exactly and start anew: "
        "this simulator is not deterministic"
    ]


def deal(
    checkpoint: Checkpoint, world: World, collector: Collector, replay: ReplayBuffer
) -> tuple[dict[str, Any], int, str]:
    """Deal the replay and the environments of a checkpoint to another number of processes.

    Transitions are dealt in turn, oldest first, so that every shard is of all times. An environment goes on
    where it was as long as there is one of its number; the rest are dropped or begin anew.

    Args:
        checkpoint: what is dealt.
        world: the processes of this run.
        collector: a new one, whose upcoming seeds go on beyond all that were used.
        replay: takes this process's share.

    Returns:
        (state of a process of the checkpoint with the environments that are this process's, running episodes
        dropped, a line about it)
    """
    rank, size, here = world.rank, world.size, collector.vec.num_envs
    processes = [checkpoint.read(f"process-{r}") for r in range(checkpoint.processes)]
    total = _deal_rows(checkpoint, world, replay)
    envs = [one for process in processes for one in process["collector"]["envs"]]
    start, count = collector.first_seed - rank * here, here * size
    beyond = max(one["rollout"]["upcoming"] for one in envs) + 1
    first = start + -(-(beyond - start) // count) * count
    mine: list[dict[str, Any] | None] = []
    for i, number in enumerate(range(rank * here, (rank + 1) * here)):
        seed = collector.rollout.upcoming[i] = first + number
        if number < len(envs):
            mine.append(envs[number] | {"rollout": envs[number]["rollout"] | {"upcoming": seed}})
        else:
            mine.append(None)
            collector.rollout.generators[i].manual_seed(seed)
    state = processes[min(rank, checkpoint.processes - 1)]
    state["collector"]["envs"] = mine
    dropped = max(0, len(envs) - count)
    note = (
        f"the checkpoint is of {checkpoint.processes} processes, this run has {size}: {total} transitions "
        f"dealt anew, {dropped} running episodes dropped"
    )
    return state, dropped, note


def _deal_rows(checkpoint: Checkpoint, world: World, replay: ReplayBuffer) -> int:
    """Put every so many-th transition into ``replay``; returns how many there are in all."""
    dealt: list[dict[str, Tensor]] = []
    total = 0
    for process in range(checkpoint.processes):
        for _, rows in checkpoint.rows(process):
            count = len(next(iter(rows.values())))
            mine = [n for n in range(count) if (total + n) % world.size == world.rank]
            dealt.append({name: value[mine] for name, value in rows.items()})
            total += count
    for rows in dealt:
        replay.put(replay.added, rows)
    return total
