"""What each of two processes does in `test_processes.py`; started by `accelerate launch`."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

import trimtab.rl.envs  # noqa: F401 - first, for it imports LeRobot in less time
from tests.helpers.faulty import FaultyConfig
from tests.helpers.point import PointAdapter
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.policies.residual import EditConfig
from trimtab.rl.algorithms import BestOfNConfig, DSRLSACConfig, Problem
from trimtab.rl.budget import TrainConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.checkpoint import CheckpointConfig, Checkpoints
from trimtab.rl.runs.faults import Stopped, StopSignals
from trimtab.rl.runs.processes import ProcessGroup, StepGuard, weights_digest
from trimtab.rl.trainer import Trainer

RL = DSRLSACConfig(
    batch_size=8, actor=ActorConfig(hidden=16, layers=1), critic=CriticConfig(hidden=16, layers=1)
)
TRAIN = TrainConfig(
    env_steps=100_000, first_update=20, warmup_transitions=20, log_every=100, updates_per_transition=1.2
)


def make_trainer(folder, accelerator, limit=13, slow=0.0, train=TRAIN):
    config, lines = FaultyConfig(limit=limit, slow=slow), []
    vec = ChunkVectorEnv(config, 2, 0, tolerant=True)
    checkpoints = Checkpoints(folder, CheckpointConfig(200), {}, ProcessGroup(accelerator))
    trainer = Trainer(
        *(PolicyRunner(PointAdapter(), config), vec, accelerator, train, RL, FullNoiseConfig(), 0),
        on_metrics=lines.append,
        progress=False,
        checkpoints=checkpoints,
    )
    return trainer, lines


def gradient_gap(accelerator):
    """Largest difference of gradients and those of one process on the union batch, in float64: this process'
    own, the average, and the average clipped to half and to twice its norm.
    """
    world, gap = ProcessGroup(accelerator), {}
    space = FullNoiseConfig().build(PointAdapter().noise_spec)
    torch.manual_seed(0)
    algorithm = RL.build(Problem(3, space, accelerator, None)).double()
    rows, dim = 16, algorithm.actor.space.dim
    union = {
        "features": torch.randn(rows, 3).double(),
        "u": torch.randn(rows, dim).double(),
        "target": torch.randn(rows).double(),
    }
    eps = torch.randn(rows, dim).double()
    part = slice(world.rank * rows // world.size, (world.rank + 1) * rows // world.size)
    sample = algorithm.actor.sample

    def losses(chosen):
        batch = {name: value[chosen] for name, value in union.items()}
        yield "critic", algorithm.critic_optimizer, algorithm.critic_loss(batch, batch["target"])[0]
        algorithm.actor.sample = lambda features: sample(features, eps[chosen])
        loss, drawn = algorithm.actor_loss(batch)
        yield "actor", algorithm.actor_optimizer, loss
        yield "alpha", algorithm.alpha_optimizer, algorithm.temperature_loss(drawn.log_prob)

    for (name, optimizer, here), (_, _, whole) in zip(losses(part), losses(slice(None)), strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        expected = torch.autograd.grad(whole, parameters)
        own = torch.autograd.grad(here, parameters)
        norm = float(torch.cat([gradient.flatten() for gradient in expected]).norm())

        def off(scale, parameters=parameters, expected=expected):
            return max(float((p.grad - scale * e).abs().max()) for p, e in zip(parameters, expected))

        gap[name] = []
        halved, as_it_is = StepGuard(world, norm / 2), StepGuard(world, 2 * norm)
        for guard, scale in ((None, 1), (StepGuard(world), 1), (halved, 0.5), (as_it_is, 1)):
            for parameter, gradient in zip(parameters, own, strict=True):
                parameter.grad = gradient.clone()
            if guard is not None:
                guard(optimizer, (), {})
            gap[name].append(off(scale))
    return gap


def edited_apart(accelerator):
    """A hash of a best-of-N with edits, built and fed otherwise on each process; None if its edits stand."""
    world, rows, size = ProcessGroup(accelerator), 8, 2
    torch.manual_seed(world.rank)
    settings = {"num_candidates": 4, "actor": RL.actor, "critic": RL.critic}
    space = FullNoiseConfig().build(PointAdapter().noise_spec)
    config = BestOfNConfig(edit=EditConfig(scale=0.3), **settings)
    algorithm = config.build(Problem(3, space, accelerator, (-20.0, 0.0), size))
    broadcast(algorithm.state_dict())
    StepGuard(world).attach(algorithm)
    began = [value.clone() for value in algorithm.edit.parameters()]
    for _ in range(4):
        batch = {name: torch.randn(rows, 3) for name in ("features", "next_features")}
        batch |= {name: torch.randn(rows, 4, size) for name in ("candidates", "next_candidates")}
        batch |= {"chunk": torch.randn(rows, size), "candidates_u": torch.randn(rows, 4, space.dim)}
        algorithm.update(batch | {"reward": -torch.rand(rows), "discount": torch.rand(rows)})
    moved = all(not torch.equal(*pair) for pair in zip(began, algorithm.edit.parameters(), strict=True))
    return weights_digest(algorithm, world) if moved else None


def main(folder):
    accelerator = Accelerator(cpu=True)
    rank, size = accelerator.process_index, accelerator.num_processes
    said = {"size": size, "gap": gradient_gap(accelerator), "edits": edited_apart(accelerator)}
    # The second process has slow simulators, and episodes so long that it hardly ever sees one end.
    trainer, lines = make_trainer(
        folder / "checkpoints", accelerator, limit=13 + 400 * rank, slow=0.001 * rank
    )
    normalizers = []
    fit = trainer.algorithm.fit_normalizer
    trainer.algorithm.fit_normalizer = lambda features: (normalizers.append(len(features)), fit(features))
    seeds = []

    def on_step(episodes):
        seeds.extend(episode.seed for episode in episodes)
        if rank == 0 and trainer.env_steps >= 800 and not trainer.stop():
            os.kill(os.getppid(), signal.SIGTERM)  # as SLURM does: the launcher hands it on

    trainer.on_step = on_step
    signals = StopSignals()
    trainer.stop, signals.deferred = signals, True
    with signals.installed(), pytest.raises(Stopped) as stopped:
        trainer.run()
    weights = torch.cat([value.flatten() for value in trainer.algorithm.state_dict().values()])
    said |= {
        "stopped": stopped.value.name,
        "env_steps": trainer.env_steps,
        "weights": weights.tolist(),
        "updates": trainer.updates,
        "transitions": trainer.transitions,
        "shard": len(trainer.replay),
        "fitted_on": normalizers,
        "seeds": seeds + list(trainer.collector.rollout.episode.values()),
        "lines": lines,
        "episodes": trainer.episodes,
    }
    (folder / f"{rank}.json").write_text(json.dumps(said))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
