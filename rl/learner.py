"""What learns in a run: the algorithm for what its collector sees, its replay, demonstrations beside it."""

from typing import Any

import torch
from accelerate.utils import broadcast
from tqdm import tqdm

from trimtab.policies.noise_space import NoiseSpace
from trimtab.rl.algorithms import Algorithm, Problem
from trimtab.rl.collector import Collector
from trimtab.rl.data.decoder import Decoder
from trimtab.rl.data.demonstration_data import read_demonstrations
from trimtab.rl.data.demonstrations import Demonstrations, make_transitions
from trimtab.rl.data.memory import check_replay, replay_layout
from trimtab.rl.data.replay import ReplayBuffer
from trimtab.rl.runs.faults import Stopped
from trimtab.rl.runs.progress import Progress
from trimtab.rl.warm_start import read_constant

CHECKED_EVERY = 20  # updates between two looks at the learning rate and at signals


def make_algorithm(run: Any, collector: Collector, space: NoiseSpace) -> Algorithm:
    """An algorithm that has learnt nothing, for what ``collector`` sees; the same on all processes."""
    adapter, rl, spec = run.runner.adapter, run.rl, collector.spec
    observe = adapter.observer.config if adapter.observer else None
    bounds, (steps, action_dim) = collector.returns.bounds, adapter.chunk_shape
    width = collector.rollout.features.shape[1] - (observe.pixels if observe else 0)
    problem = Problem(width, space, run.accelerator, bounds, steps * action_dim, observe)
    algorithm: Algorithm = rl.build(problem)
    if spec:
        algorithm.decode = Decoder(adapter, space, spec)
    if run.train.warm_start:
        noise = read_constant(run.train.warm_start, adapter.noise_spec)
        algorithm.start = algorithm.actor.begin_at(noise)
    broadcast(algorithm.state_dict())  # every process begins with the first one's weights
    return algorithm


def make_learner(
    run: Any, collector: Collector, space: NoiseSpace
) -> tuple[Algorithm, ReplayBuffer, Demonstrations | None]:
    """The learner of a ``Trainer`` ``run``, which acts in ``collector`` from here on.

    Raises:
        UserError: the replay does not fit into the memory, or the demonstrations do not fit the policy.
    """
    adapter, spec, train, rl = run.runner.adapter, collector.spec, run.train, run.rl
    width = collector.rollout.features.shape[1]
    if spec:
        spec.check_memory(train.replay_capacity, rl.conditioning_limit)
    algorithm = make_algorithm(run, collector, space)
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
    rate = None if run.vec.empty else run.runner.fps
    for note in data.summary(len(transitions), rate) if run.progress else ():
        tqdm.write(note)
    return algorithm, replay, demonstrations


def fit(run: Any, algorithm: Algorithm) -> None:
    """Let an algorithm that has learnt nothing begin with the statistics of all that all processes saw.

    The environment's own rewards may be small beside their bounds. In the middle of these an episode that
    goes on would be worth more than success.
    """
    demos = [run.demonstrations] if run.demonstrations else []
    seen = run.world.gather(run.replay.all_features()) + [one.all_features() for one in demos]
    algorithm.fit_normalizer(torch.cat(seen))
    if run.train.reward == "env":
        returned = run.world.gather(run.replay.returned()) + [one.returned() for one in demos]
        reward, ended = torch.stack(returned).sum(0)
        algorithm.begin_at(float(reward / ended.clamp_min(1e-9)))


def learn_anew(run: Any) -> Algorithm:
    """The algorithm of a ``Trainer`` ``run``, learnt once more from the beginning on all that was seen.

    What was learnt while there was little to learn from stays in the networks ("The Primacy Bias in Deep
    Reinforcement Learning", Nikishin et al., arXiv 2205.07802). It takes ``TrainConfig.restart`` of the
    updates so far; of none, the algorithm stays as it is. No checkpoint is written meanwhile.

    Raises:
        Stopped: a signal ended it.
        UserError: more faults than the limit.
    """
    if run.train.restart and not run.env_steps and run.progress:
        tqdm.write("note: --train.restart has no effect before the first environment step")
    updates = round((run.train.restart or 0.0) * run.updates) if run.env_steps else 0
    if not updates:
        return run.algorithm
    algorithm = make_algorithm(run, run.collector, run.space)
    run.guard.attach(algorithm)
    fit(run, algorithm)
    for number in Progress(range(updates), desc="learning anew", unit="step", disable=not run.progress):
        if number % CHECKED_EVERY == 0:
            algorithm.progress(number / updates)
            if any(run.world.gather(run.stop())):
                raise Stopped(run.stop.name or "a signal to another process", run.env_steps)
            run.faults.gather(run.world, run.guard)
            run.faults.check()
        algorithm.update(run.batch(number / updates))
    run.faults.gather(run.world, run.guard)
    run.faults.check()
    run.updates += updates
    return algorithm
