"""Taking a training run apart into plain values, and putting it together again where it was.

All that can be saved is saved; a simulator cannot. So each running episode is lived through once more: its
environment is reset with the episode's seed and the actions that were executed are executed again. Every
observation on the way must be the one that was seen then, to the bit; an episode for which that does not hold
(a simulator that is not deterministic) is dropped, counted, and a new one starts in its place. An environment
that is known not to repeat (a robot above all) is not moved for that: its episodes are dropped at once.
"""

from __future__ import annotations

import hashlib
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trimtab.adapters import UserError
from trimtab.policies.acting import Candidates
from trimtab.rl.algorithms import Algorithm
from trimtab.rl.collector import Collector, Episode, _Running, digest
from trimtab.rl.runs.checkpoint import LEARNER, Checkpoint
from trimtab.rl.runs.processes import optimizers

if TYPE_CHECKING:
    from trimtab.rl.train import Trainer

# Counters of a trainer that all processes share.
SHARED = ("transitions", "episodes", "updates", "env_steps", "dropped", "_owed", "_logged", "_warming")


def plain_state(holder: Any, leave: tuple[str, ...] = ()) -> dict[str, Any]:
    """The attributes of an object: plain values, and the states of generators.

    Args:
        holder: the object.
        leave: attributes that do not change.

    Raises:
        TypeError: from ``checkpoint.pack``, for an attribute of another kind, so that none is forgotten.
    """
    found = {}
    for name, value in vars(holder).items():
        if name in leave:
            continue
        if isinstance(value, np.random.Generator):
            value = value.bit_generator.state
        elif isinstance(value, torch.Generator):
            value = value.get_state()
        found[name] = value
    return found


def load_plain_state(holder: Any, state: dict[str, Any]) -> None:
    """The inverse of ``plain_state``, on an object of the same make."""
    for name, value in state.items():
        now = getattr(holder, name)
        if isinstance(now, np.random.Generator):
            now.bit_generator.state = value
        elif isinstance(now, torch.Generator):
            now.set_state(value)
        elif isinstance(now, deque):
            now.clear()
            now.extend(value)
        else:
            setattr(holder, name, value)


# Of an optimiser's groups: its weights have their own place, its rate follows from the steps of the run.
UNSAVED = "params", "lr"


def algorithm_state(algorithm: Algorithm) -> dict[str, Any]:
    """Networks, temperature, normalisers, counters and all optimisers."""
    counters = {name: v for name, v in vars(algorithm).items() if type(v) is int}
    found: dict[str, Any] = {"tensors": algorithm.state_dict(), "counters": counters, "optimizers": {}}
    for name, optimizer in optimizers(algorithm).items():
        state = optimizer.state_dict()
        groups = [{k: v for k, v in group.items() if k not in UNSAVED} for group in state["param_groups"]]
        found["optimizers"][name] = {"state": state["state"], "groups": groups}
    return found


def load_algorithm(algorithm: Algorithm, state: dict[str, Any]) -> None:
    """The inverse of ``algorithm_state``."""
    algorithm.load_state_dict(state["tensors"])
    for name, value in state["counters"].items():
        setattr(algorithm, name, value)
    for name, optimizer in optimizers(algorithm).items():
        held, now = state["optimizers"][name], optimizer.state_dict()
        for group, saved in zip(now["param_groups"], held["groups"], strict=True):
            # A tuple (Adam's betas) comes back as a list.
            kept = {k: v for k, v in saved.items() if k not in UNSAVED}
            group |= {k: tuple(v) if isinstance(group[k], tuple) else v for k, v in kept.items()}
        state_by_index = {int(index): dict(entry) for index, entry in held["state"].items()}
        optimizer.load_state_dict({"state": state_by_index, "param_groups": now["param_groups"]})


def collector_state(collector: Collector) -> dict[str, Any]:
    """All of a collector but the simulators, environment by environment, between two chunks."""
    drawn = collector._candidates
    return {
        "env_steps": collector.env_steps,
        "seconds": dict(collector.seconds),
        "envs": [
            {
                "next_seed": collector._next_seed[i],
                "generator": collector._generators[i].get_state(),
                "pending": collector._accumulators[i].state_dict(),
                "running": dict(vars(collector._running[i])),
                "candidates": None if drawn is None else {"u": drawn.u[i], "chunks": drawn.chunks[i]},
            }
            for i in range(len(collector._envs))
        ],
    }


def load_collector(collector: Collector, state: dict[str, Any], envs: list[dict[str, Any] | None]) -> int:
    """Put a collector where it was.

    Args:
        collector: a new one.
        state: from ``collector_state``.
        envs: the saved state of each of its environments; ``None`` for one that begins anew.

    Returns:
        how many episodes could not be repeated and were dropped.
    """
    collector.env_steps, collector.seconds = state["env_steps"], collector.seconds | state["seconds"]
    saved = {i: held for i, held in enumerate(envs) if held is not None}
    if not collector.vec.repeatable:
        return begin_anew(collector, saved)
    for i, held in saved.items():
        collector._next_seed[i] = held["next_seed"]
        collector._generators[i].set_state(held["generator"])
        collector._accumulators[i].load_state_dict(held["pending"])
        collector._running[i] = _Running(**held["running"])
    observations, lost = return_to(collector, saved)
    for i in lost:
        collector.runner.forget(i)
        collector._accumulators[i].clear()
    begun = [i for i in collector._envs if i not in saved or i in lost]
    taken = collector._take_seeds(begun)
    for i in begun:
        collector._running[i] = _Running(steered=collector.assign(), seed=taken[i])
        collector.runner.forget(i)
    observations |= collector.vec.reset(taken) if taken else {}
    for i in begun:
        collector._note_observation(i, observations[i])
    collector._look([observations[i] for i in collector._envs])
    collector.start(collector.learner)
    for i, held in saved.items():
        if i in lost:
            continue
        collector._generators[i].set_state(held["generator"])  # drawing candidates has moved it
        if held["candidates"] is not None:
            drawn: Candidates = collector._candidates
            drawn.u[i] = held["candidates"]["u"].to(drawn.u)
            drawn.chunks[i] = held["candidates"]["chunks"].to(drawn.chunks)
    return len(lost)


def begin_anew(collector: Collector, saved: dict[int, dict[str, Any]]) -> int:
    """Leave the environments in the episodes that have just begun: none is reset again, none is stepped.

    Returns:
        how many episodes were interrupted, and are dropped.
    """
    for i, running in enumerate(collector._running):
        fresh = _Running(steered=collector.assign(), seed=running.seed, digests=running.digests)
        collector._running[i] = fresh
    for i, held in saved.items():
        collector._next_seed[i] = held["next_seed"]
        collector._generators[i].set_state(held["generator"])
    collector.start(collector.learner)
    return sum(bool(held["running"]["actions"]) for held in saved.values())


def return_to(collector: Collector, saved: dict[int, dict[str, Any]]) -> tuple[dict[int, Any], list[int]]:
    """Execute the running episodes' actions again, from their seeds.

    Returns:
        (the observations where they stood, environments whose episode did not go as it had gone)
    """
    vec, runner, running = collector.vec, collector.runner, collector._running
    observations = vec.reset({i: running[i].seed for i in saved}) if saved else {}
    lost = {i for i in saved if digest(observations[i]) != running[i].digests[0]}
    for i in saved:
        runner.forget(i)
    for step in range(max((len(running[i].actions) for i in saved), default=0)):
        going = [i for i in saved if i not in lost and step < len(running[i].actions)]
        if not going:
            break
        if runner.adapter.remembers:  # what it remembers comes of the chunks it has made
            for i in going:
                (encoded,) = runner.encode([observations[i]], [vec.task_descriptions[i]], [i])
                chunk = torch.as_tensor(running[i].chunks[step]).view(runner.adapter.chunk_shape)
                chunk = chunk[: len(running[i].actions[step])].to(runner.adapter.device)
                runner.remember(i, encoded, chunk.unsqueeze(0))
        vec.send({i: running[i].actions[step] for i in going}, dict.fromkeys(going))
        for i, result in vec.receive().items():
            if result.ended or result.lost or digest(result.observation) != running[i].digests[step + 1]:
                lost.add(i)
            else:
                observations[i] = result.observation
    return observations, sorted(lost)


def trainer_state(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what all processes share, what is this process's own), between two chunks."""
    shared = {name: getattr(trainer, name) for name in SHARED}
    shared |= {
        "faults": trainer.faults.counts,
        "reported": trainer.reported,
        "returns": list(trainer.returns),
        "window": {name: list(window.state_dict()) for name, window in trainer.windows.items()},
        "algorithm": algorithm_state(trainer.algorithm),
    }
    device, demos = trainer.accelerator.device, trainer.demonstrations
    own = {
        "rng": torch.get_rng_state(),
        "device_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "replay": trainer.replay.state_dict(),
        "demonstrations": demos.state_dict() if demos is not None else None,
        "gate": plain_state(trainer.gate, ("config",)),
        "recent": [vars(episode) for episode in trainer.recent],
        "sums": dict(trainer.sums),
        "counts": dict(trainer.counts),
        "seconds": {"update": trainer.update_seconds, "total": trainer.seconds},
        "collector": collector_state(trainer.collector),
        "weights": (here := weights_digest(trainer.algorithm)),
    }
    if len(set(trainer.world.gather(here))) > 1:
        raise RuntimeError("the processes' weights have drifted apart; this is a bug of trimtab")
    return shared, own


def weights_digest(algorithm: Algorithm) -> str:
    """A hash of an algorithm's weights and buffers."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(algorithm.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def load_trainer(trainer: Trainer, checkpoint: Checkpoint) -> list[str]:
    """Put a new trainer where a checkpoint was written.

    Returns:
        lines about what could not be as it was.

    Raises:
        UserError: the checkpoint does not fit the trainer.
    """
    try:
        return _load_trainer(trainer, checkpoint)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            "--resume", f"{checkpoint.folder} does not fit this run ({type(error).__name__}: {error})"
        ) from error


def _load_trainer(trainer: Trainer, checkpoint: Checkpoint) -> list[str]:
    shared = checkpoint.read(LEARNER)
    for name in SHARED:
        setattr(trainer, name, shared[name])
    trainer.faults.counts |= shared["faults"]
    for name, held in shared["window"].items():
        trainer.windows[name].load_state_dict(held)
    trainer.reported = shared.get("reported", True)  # checkpoints of older versions do not say
    trainer.returns.extend(shared.get("returns", ()))
    load_algorithm(trainer.algorithm, shared["algorithm"])
    rank, size, before = trainer.world.rank, trainer.world.size, checkpoint.processes
    owns = {r: checkpoint.read(f"process-{r}") for r in range(before)} if before != size else {}
    own = owns[min(rank, before - 1)] if owns else checkpoint.read(f"process-{rank}")
    load_plain_state(trainer.gate, own["gate"])
    trainer.update_seconds, trainer.seconds = own["seconds"]["update"], own["seconds"]["total"]
    notes: list[str] = []
    if not owns:
        envs: list[Any] = own["collector"]["envs"]
        for start, rows in checkpoint.rows(rank):
            trainer.replay.put(start, rows)
        trainer.replay.load_state_dict(own["replay"])
        if trainer.demonstrations is not None:
            trainer.demonstrations.load_state_dict(own["demonstrations"])
        trainer.recent.extend(Episode(**held) for held in own["recent"])
        trainer.sums, trainer.counts = dict(own["sums"]), dict(own["counts"])
    else:
        envs, note = _redistribute(trainer, checkpoint, owns)
        notes.append(note)
    trainer.vec.repeatable = trainer.world.all(trainer.vec.repeatable)
    lost = load_collector(trainer.collector, own["collector"], envs)
    if not trainer.vec.repeatable:
        lost = int(trainer.world.sum([lost])[0])
        trainer.dropped += lost
        notes.append(
            f"{lost} interrupted episode{'s' * (lost != 1)} dropped, new ones begin: this environment cannot "
            "repeat them"
        )
        lost = 0  # no faults: it never said that it could
    for _ in range(lost):
        trainer.faults.add("unrepeatable", "--env.type: the simulator does not repeat an episode")
    if lost:
        notes.append(
            f"{lost} running episode{'s' * (lost > 1)} did not repeat exactly and start anew: "
            "this simulator is not deterministic"
        )
    if not owns:  # last: building and looking may have drawn
        torch.set_rng_state(own["rng"])
        if own["device_rng"] is not None and trainer.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(own["device_rng"], trainer.accelerator.device)
    return notes


def _redistribute(
    trainer: Trainer, checkpoint: Checkpoint, owns: dict[int, dict[str, Any]]
) -> tuple[list[Any], str]:
    """Deal the replay and the environments of a checkpoint to another number of processes.

    Transitions are dealt in turn, oldest first, so that every shard is of all times. An environment goes on
    where it was as long as there is one of its number; the rest are dropped or begin anew.
    """
    rank, size = trainer.world.rank, trainer.world.size
    dealt: list[dict[str, Tensor]] = []
    total = 0
    for process in owns:
        for _, rows in checkpoint.rows(process):
            count = len(next(iter(rows.values())))
            mine = [n for n in range(count) if (total + n) % size == rank]
            dealt.append({name: value[mine] for name, value in rows.items()})
            total += count
    for rows in dealt:
        trainer.replay.put(trainer.replay.added, rows)
    envs = [held for own in owns.values() for held in own["collector"]["envs"]]
    here, count = trainer.vec.num_envs, trainer.vec.num_envs * size
    # Seeds go on beyond all that were used, in the new stride.
    beyond = max(held["next_seed"] for held in envs) + 1
    first = trainer.collector.seed + -(-(beyond - trainer.collector.seed) // count) * count
    for i in range(here):
        trainer.collector._next_seed[i] = first + rank * here + i
    mine: list[Any] = []
    for i, place in enumerate(range(rank * here, (rank + 1) * here)):
        held = envs[place] if place < len(envs) else None
        mine.append(None if held is None else held | {"next_seed": trainer.collector._next_seed[i]})
        if held is None:
            trainer.collector._generators[i].manual_seed(first + place)
    dropped = max(0, len(envs) - count)
    torch.manual_seed(first + rank)
    note = (
        f"the checkpoint is of {checkpoint.processes} processes, this run has {size}: {total} transitions "
        f"dealt anew, {dropped} running episodes dropped"
    )
    trainer.dropped += dropped
    return mine, note
