"""What learns in a run: the algorithm for what its collector sees, its replay, demonstrations beside it."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from trimtab.policies.noise_space import NoiseSpace
from trimtab.rl.algorithms import Algorithm, Problem
from trimtab.rl.collector import Collector
from trimtab.rl.data.decoder import Decoder
from trimtab.rl.data.demonstration_data import read_demonstrations
from trimtab.rl.data.demonstrations import Demonstrations, make_transitions
from trimtab.rl.data.memory import check_replay, replay_layout
from trimtab.rl.data.replay import ReplayBuffer


def make_learner(
    run: Any, collector: Collector, space: NoiseSpace
) -> tuple[Algorithm, ReplayBuffer, Demonstrations | None]:
    """The learner of a ``Trainer`` ``run``, which acts in ``collector`` from here on.

    Raises:
        UserError: the replay does not fit into the memory, or the demonstrations do not fit the policy.
    """
    adapter, spec, train, rl = run.runner.adapter, collector.spec, run.train, run.rl
    observe = adapter.observer.config if adapter.observer else None
    bounds, (steps, action_dim) = collector.returns.bounds, adapter.chunk_shape
    width = collector.rollout.features.shape[1]
    problem = Problem(
        width - (observe.pixels if observe else 0),
        space,
        run.accelerator,
        bounds,
        steps * action_dim,
        observe,
    )
    algorithm: Algorithm = rl.build(problem)
    if spec:
        spec.check_memory(train.replay_capacity, rl.conditioning_limit)
        algorithm.decode = Decoder(adapter, space, spec)
    layout = replay_layout(rl, adapter, space, width, spec)
    check_replay(train.replay_capacity, layout)
    settings = layout, run.seed + run.world.rank, run.accelerator.device
    replay = ReplayBuffer(-(-train.replay_capacity // run.world.size), *settings)
    collector.start(algorithm)
    if not run.demos.enabled:
        return algorithm, replay, None
    data = read_demonstrations(run.demos, adapter, train.reward, run.vec.task_descriptions[0])
    transitions = make_transitions(
        data, run.runner, algorithm, collector.returns, spec, run.seed, run.progress
    )
    demonstrations = Demonstrations(run.demos, transitions, *settings)
    for note in data.summary(len(transitions), run.runner.fps) if run.progress else ():
        tqdm.write(note)
    return algorithm, replay, demonstrations
