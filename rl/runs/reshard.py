"""A checkpoint of another number of processes, resharded among those of this run."""

from trimtab.rl.collector import Collector
from trimtab.rl.data.replay import ReplayBuffer
from trimtab.rl.runs.checkpoint import Checkpoint
from trimtab.rl.runs.processes import ProcessGroup


def reshard(
    checkpoint: Checkpoint, world: ProcessGroup, collector: Collector, replay: ReplayBuffer
) -> tuple[int, str]:
    """Take up the replay of a checkpoint of another number of processes; its running episodes are dropped.

    The processes take transitions in turn, oldest first, so that every shard is of all times. Seeds go on
    beyond all that were used.

    Returns:
        (running episodes dropped, a line about it)
    """
    processes = [checkpoint.read(rank) for rank in range(checkpoint.processes)]
    total = 0
    for process in processes:
        count = len(process["rows"]["reward"])
        mine = [n for n in range(count) if (total + n) % world.size == world.rank]
        replay.put(replay.added, {name: value[mine] for name, value in process["rows"].items()})
        total += count
    running = [one["rollout"] for process in processes for one in process["collector"]["envs"]]
    collector.skip(max(one["upcoming"] for one in running) + 1)
    note = (
        f"the checkpoint is of {checkpoint.processes} processes, this run has {world.size}: {total} "
        f"transitions resharded, {len(running)} running episodes dropped"
    )
    return len(running), note
