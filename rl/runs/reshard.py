"""A checkpoint of another number of processes, resharded among those of this run."""

from __future__ import annotations

from typing import Any

from trimtab.rl.collector import Collector
from trimtab.rl.data.replay import ReplayBuffer
from trimtab.rl.runs.checkpoint import Checkpoint
from trimtab.rl.runs.processes import ProcessGroup


def reshard(
    checkpoint: Checkpoint, world: ProcessGroup, collector: Collector, replay: ReplayBuffer
) -> tuple[dict[str, Any], int, str]:
    """Reshard the replay and the environments of a checkpoint for another number of processes.

    The processes take transitions in turn, oldest first, so that every shard is of all times. An
    environment goes on where it was as long as there is one of its number; the rest are dropped or begin
    anew.

    Args:
        checkpoint: what is resharded.
        world: the processes of this run.
        collector: a new one, whose upcoming seeds go on beyond all that were used.
        replay: takes this process's share.

    Returns:
        (state of a process of the checkpoint with this process's environments, running episodes dropped, a
        line about it)
    """
    rank, size, here = world.rank, world.size, collector.vec.num_envs
    processes = [checkpoint.read(f"process-{r}") for r in range(checkpoint.processes)]
    total = 0
    for process in processes:
        count = len(process["rows"]["reward"])
        mine = [n for n in range(count) if (total + n) % size == rank]
        replay.put(replay.added, {name: value[mine] for name, value in process["rows"].items()})
        total += count
    saved = [one for process in processes for one in process["collector"]["envs"]]
    first, count = collector.first_seed - rank * here, here * size
    beyond = max(one["rollout"]["upcoming"] for one in saved) + 1
    first += -(-(beyond - first) // count) * count
    envs: list[dict[str, Any] | None] = []
    for i, number in enumerate(range(rank * here, (rank + 1) * here)):
        seed = collector.rollout.upcoming[i] = first + number
        if number < len(saved):
            envs.append(saved[number] | {"rollout": saved[number]["rollout"] | {"upcoming": seed}})
        else:
            envs.append(None)
            collector.rollout.generators[i].manual_seed(seed)
    state = processes[min(rank, checkpoint.processes - 1)]
    state["collector"]["envs"] = envs
    dropped = max(0, len(saved) - count)
    note = (
        f"the checkpoint is of {checkpoint.processes} processes, this run has {size}: {total} transitions "
        f"resharded, {dropped} running episodes dropped"
    )
    return state, dropped, note
