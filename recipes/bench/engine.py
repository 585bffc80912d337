"""Updates per second of our DSRL-SAC learner and of stable-baselines3's SAC, like for like."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import PolicyAdapter
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_samplers import prior_noise
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpace
from trimtab.recipes.bench.clock import CPU, clock_of, unit_of
from trimtab.recipes.bench.updates import endings
from trimtab.rl.algorithms import DSRLSACConfig, Problem
from trimtab.rl.collector import Collector
from trimtab.rl.data.replay import ReplayBuffer
from trimtab.rl.data.returns import Transition, value_bounds
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.runner import PolicyRunner

GAMMA, BATCH, LAYERS, RATE = 0.99, 256, 3, 1e-3
WARM_UP = 60  # updates after which those of every kind are recorded as CUDA graphs
SB3 = "sb3"
# What is measured beside it, each in float32 and in bfloat16: (actor updates every, LayerNorm in critics).
OURS = {"like_for_like": (1, False), "layer_norm": (1, True), "default": (2, True)}


def variants(device: torch.device) -> dict[str, dict[str, Any]]:
    """Arguments of ``our_learner`` by name; on a GPU each also recorded as CUDA graphs."""
    return {
        name + ending: {"every": every, "norm": norm, **settings}
        for name, (every, norm) in OURS.items()
        for ending, settings in endings(device).items()
    }


def collect(
    runner: PolicyRunner, vec: ChunkVectorEnv, space: NoiseSpace, transitions: int
) -> list[Transition]:
    """At least so many transitions of one chunk each, under what an untrained actor draws."""
    source, found = prior_noise(space), []
    collector = Collector(runner, vec, space, GAMMA, 1, "sparse", seed=0)
    while len(found) < transitions:
        collector.begin(source)
        found += collector.finish()[0]
    return found


def our_learner(
    transitions: Sequence[Transition],
    space: NoiseSpace,
    hidden: int,
    device: torch.device,
    every: int,
    norm: bool,
    precision: str,
    engine: str,
) -> Callable[[int], None]:
    """A function that makes so many updates of DSRL-SAC: with the entropy in the backup as in
    stable-baselines3, two critics, Adam.
    """
    features = len(transitions[0].features)
    config = DSRLSACConfig(
        gamma=GAMMA,
        n_step=1,
        batch_size=BATCH,
        actor=ActorConfig(hidden=hidden, layers=LAYERS),
        critic=CriticConfig(members=2, hidden=hidden, layers=LAYERS, layer_norm=norm),
        learning_rate=RATE,
        actor_every=every,
        backup_entropy=True,
        precision=precision,
        engine=engine,
    )
    torch.manual_seed(0)
    bounds = value_bounds("sparse", GAMMA)
    algorithm = config.build(Problem(features, space, Accelerator(cpu=device.type == "cpu"), bounds))
    replay = ReplayBuffer(len(transitions), features, space.dim, 0, device)
    for transition in transitions:
        replay.add(transition)
    algorithm.fit_normalizer(replay.all_features())

    def update(count: int) -> None:
        for _ in range(count):
            algorithm.update(replay.sample(BATCH))

    return update


def sb3_learner(
    transitions: Sequence[Transition],
    runner: PolicyRunner,
    vec: ChunkVectorEnv,
    space: NoiseSpace,
    hidden: int,
    device: torch.device,
) -> Callable[[int], None]:
    """A function that makes so many updates of stable-baselines3's SAC on the same transitions.

    Args:
        transitions: a multiple of ``vec.num_envs``: its replay takes one of each environment.
        runner, vec: give it its spaces; it doesn't step them.
        space: noise space.
        hidden: width.
        device: of its networks.
    """
    from trimtab.recipes.bench.wrapper import NoiseVecEnv, SB3SACConfig, make_sac

    env = NoiseVecEnv(runner, vec, space, GAMMA, "sparse", seed=0)
    config = SB3SACConfig(hidden=hidden, layers=LAYERS, learning_rate=RATE, batch_size=BATCH, gamma=GAMMA)
    steps = runner.adapter.chunk_shape[0]
    model = make_sac(config, env, steps, seed=0, buffer_size=len(transitions), device=device)
    for start in range(0, len(transitions), vec.num_envs):
        rows = transitions[start : start + vec.num_envs]
        model.replay_buffer.add(
            np.stack([row.features for row in rows]),
            np.stack([row.next_features for row in rows]),
            np.stack([row.u for row in rows]) / space.bound,  # it keeps actions in [-1, 1]
            np.array([row.reward for row in rows]),
            np.array([row.discount == 0.0 for row in rows]),
            [{} for _ in rows],
        )

    def update(count: int) -> None:
        model.train(gradient_steps=count, batch_size=BATCH)

    return update


def measure(
    learners: dict[str, Callable[[int], None]],
    repetitions: int,
    updates: int,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Let the learners take turns, and compare each with stable-baselines3 in the same turn.

    Returns:
        by name: ``updates_per_second`` of each turn, in seconds of the device's clock (``clock.py``); their
        ``median``; and of ours ``ratio``, the median over the turns of its speed by stable-baselines3's,
        with the ``ratios``.
    """
    clock = clock_of(device)
    for learner in learners.values():
        learner(WARM_UP if device.type == "cuda" else max(2, updates // 10))
    speeds: dict[str, list[float]] = {name: [] for name in learners}
    for turn in range(repetitions):
        order = list(learners) if turn % 2 == 0 else list(reversed(learners))
        for name in order:
            started = clock()
            learners[name](updates)
            speeds[name].append(updates / (clock() - started))
    found: dict[str, dict[str, Any]] = {}
    for name, speed in speeds.items():
        found[name] = {
            "updates_per_second": [round(value, 2) for value in speed],
            "median": round(statistics.median(speed), 2),
        }
        if name != SB3:
            ratios = [ours / theirs for ours, theirs in zip(speed, speeds[SB3], strict=True)]
            found[name] |= {
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
    return found


def run_engine(
    adapter: PolicyAdapter,
    env: EnvConfig,
    widths: Sequence[int],
    repetitions: int,
    updates: int,
    transitions: int,
    num_envs: int = 8,
    workers: int = 1,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """The whole comparison; one thread is the caller's to set. The learners are on ``device``.

    Returns:
        ``{"widths": {width: measure(...)}, "setting": {...}}``
    """
    space, runner = FullNoiseConfig().build(adapter.noise_spec), PolicyRunner(adapter, env)
    found: dict[str, Any] = {}
    with ChunkVectorEnv(env, num_envs, workers, adapter.n_obs_steps) as vec:
        contents = collect(runner, vec, space, transitions)
        contents = contents[: len(contents) // num_envs * num_envs]
        for hidden in widths:
            learners = {SB3: sb3_learner(contents, runner, vec, space, hidden, device)}
            for name, settings in variants(device).items():
                learners[name] = our_learner(contents, space, hidden, device, **settings)
            found[str(hidden)] = measure(learners, repetitions, updates, device)
    setting = {
        "layers": LAYERS,
        "batch_size": BATCH,
        "critics": 2,
        "features": len(contents[0].features),
        "noise": space.dim,
        "transitions": len(contents),
        "repetitions": repetitions,
        "updates_per_repetition": updates,
        "threads": torch.get_num_threads(),
        "seconds": unit_of(device),
    }
    return {"setting": setting, "widths": found}
