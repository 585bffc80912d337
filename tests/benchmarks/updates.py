"""Updates per second of every learner, one thread, in turns on random transitions; sampling included.

python -m tests.benchmarks.updates --learners=sb3,like_for_like,default
python -m tests.benchmarks.updates --learners=dsrl_sac,dsrl_na,best_of_n --precisions=float32,bfloat16
python -m tests.benchmarks.updates --learners=dsrl_sac,best_of_n --engines=eager,compile
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from trimtab.adapters import NoiseSpec
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.recipes.support.reporting import write_json
from trimtab.rl.algorithms import AlgorithmConfig, BestOfNConfig, DSRLNAConfig, DSRLSACConfig, Problem
from trimtab.rl.data.memory import replay_layout
from trimtab.rl.data.replay import ReplayBuffer
from trimtab.rl.data.returns import Returns, Transition

STEPS, ACTION_DIM, FEATURES = 8, 4, 39  # those of the embedded base
DIM = STEPS * ACTION_DIM
TRANSITIONS = 2_000
SB3 = "sb3"
Learner = Callable[[int], None]  # makes so many updates


def as_sb3(every: int, norm: bool) -> Callable[..., AlgorithmConfig]:
    """DSRL-SAC with the entropy in the backup as in stable-baselines3, two critics, Adam."""

    def make(actor: dict[str, Any], critic: dict[str, Any], **settings: Any) -> AlgorithmConfig:
        return DSRLSACConfig(
            n_step=1,
            actor=ActorConfig(**actor, layers=3),
            critic=CriticConfig(**critic, members=2, layers=3, layer_norm=norm),
            learning_rate=1e-3,
            actor_every=every,
            backup_entropy=True,
            **settings,
        )

    return make


def defaults(config: type[AlgorithmConfig]) -> Callable[..., AlgorithmConfig]:
    """An algorithm with its defaults at this width."""
    return lambda actor, critic, **settings: config(
        actor=ActorConfig(**actor), critic=CriticConfig(**critic), **settings
    )


OURS: dict[str, Callable[..., AlgorithmConfig]] = {
    # What stable-baselines3 has: actor and temperature at every update, no LayerNorm.
    "like_for_like": as_sb3(1, False),
    "layer_norm": as_sb3(1, True),
    "default": as_sb3(2, True),
    "dsrl_sac": defaults(DSRLSACConfig),
    "dsrl_na": defaults(DSRLNAConfig),
    "best_of_n": defaults(BestOfNConfig),
}


def variants(
    names: Sequence[str], precisions: Sequence[str], engines: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Settings of each learner to be timed: ``default``, ``default_bfloat16``, ``default_compile``, ..."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == SB3:
            found[name] = {}
            continue
        for precision in precisions:
            for engine in engines:
                ending = (precision != "float32") * f"_{precision}" + (engine != "eager") * f"_{engine}"
                found[name + ending] = {"of": name, "precision": precision, "engine": engine}
    return found


def ours(of: str, width: int, device: torch.device, transitions: int, **settings: Any) -> Learner:
    """A learner of ``OURS``; what an update costs does not depend on what is in the transitions."""
    torch.manual_seed(0)
    config = OURS[of]({"hidden": width}, {"hidden": width}, **settings)
    space = FullNoiseConfig().build(NoiseSpec((STEPS, ACTION_DIM)))
    bounds = Returns("sparse", config.gamma, config.discount_per, STEPS).bounds
    accelerator = Accelerator(cpu=device.type == "cpu")
    algorithm = config.build(Problem(FEATURES, space, accelerator, bounds, DIM))
    policy, rng = SimpleNamespace(chunk_shape=(STEPS, ACTION_DIM), observer=None), np.random.default_rng(0)
    layout = replay_layout(config, policy, space, FEATURES)
    replay = ReplayBuffer(transitions, layout, 0, device)
    for _ in range(transitions):
        more = {name: np.tanh(rng.standard_normal(shape)) for name, (shape, _) in layout.extra.items()}
        seen, following = rng.standard_normal((2, FEATURES))
        u = np.tanh(rng.standard_normal(DIM))
        replay.add(Transition(seen, u, -rng.random(), 0.9, following, extra=more))
    algorithm.fit_normalizer(replay.all_features())

    def update(count: int) -> None:
        for _ in range(count):
            algorithm.update(replay.sample(config.batch_size))

    return update


def sb3(width: int, device: torch.device, transitions: int) -> Learner:
    """stable-baselines3's SAC on as many."""
    import gymnasium
    from stable_baselines3.common.vec_env import DummyVecEnv

    from tests.benchmarks.sb3 import SB3SACConfig, make_sac

    class Spaces(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (FEATURES,), np.float32)
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (DIM,), np.float32)

    rng = np.random.default_rng(0)
    env = DummyVecEnv([Spaces])
    model = make_sac(SB3SACConfig(hidden=width), env, STEPS, 0, buffer_size=transitions, device=device)
    for _ in range(transitions):
        seen, following = rng.standard_normal((2, 1, FEATURES))
        u, reward = np.tanh(rng.standard_normal((1, DIM))), -rng.random(1)
        model.replay_buffer.add(seen, following, u, reward, np.zeros(1), [{}])
    return lambda count: model.train(gradient_steps=count, batch_size=model.batch_size)


def wall_clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds of wall-clock; on a GPU once everything that was asked of it is done."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def measure(
    learners: dict[str, Learner], device: torch.device, repetitions: int, updates: int
) -> dict[str, dict[str, Any]]:
    """Let the learners take turns, and compare each with the first in the same turn.

    Returns:
        by name: ``ms`` of an update and ``updates_per_second``, medians over the turns; ``ratios``: its speed
        over the first one's in each turn, and ``ratio``, their median; ``first_seconds``: wall-clock of the
        first 51 updates, in which compilation falls.
    """
    # On the CPU this process's own time, so that what else runs disturbs it less.
    clock = wall_clock_of(device) if device.type == "cuda" else time.process_time
    first: dict[str, float] = {}
    for name, learner in learners.items():
        started = time.perf_counter()
        learner(51)  # all that happens now and then has happened once
        first[name] = time.perf_counter() - started
    taken: dict[str, list[float]] = {name: [] for name in learners}
    for turn in range(repetitions):
        for name in learners if turn % 2 == 0 else reversed(learners):
            started = clock()
            learners[name](updates)
            taken[name].append((clock() - started) / updates)
    beside = next(iter(taken.values()))
    found: dict[str, dict[str, Any]] = {}
    for name, seconds in taken.items():
        ratios = [other / own for own, other in zip(seconds, beside, strict=True)]
        found[name] = {
            "ms": round(1e3 * statistics.median(seconds), 3),
            "updates_per_second": round(1 / statistics.median(seconds), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "first_seconds": round(first[name], 1),
        }
    return found


def table(found: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Markdown."""
    lines = [
        "| width | learner | ms per update | per second | by the first's: median (range) | first 51, s |",
        "|---|---|---|---|---|---|",
    ]
    for width, rows in found.items():
        for name, row in rows.items():
            spread = f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
            lines.append(
                f"| 3x{width} | `{name}` | {row['ms']:.2f} | {row['updates_per_second']:.0f} | {spread} "
                f"| {row['first_seconds']:.0f} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.updates", description=__doc__)
    parser.add_argument("--learners", type=names, default=[SB3, *OURS], help=", ".join([SB3, *OURS]))
    parser.add_argument("--precisions", type=names, default=["float32"])
    parser.add_argument("--engines", type=names, default=["eager"])
    parser.add_argument("--widths", type=names, default=["128", "256"])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--updates", type=int, default=100, help="in a turn; whole fifties count right")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for width in map(int, options.widths):
        where = (width, options.device, TRANSITIONS)
        learners = {
            name: ours(settings.pop("of"), *where, **settings) if settings else sb3(*where)
            for name, settings in variants(options.learners, options.precisions, options.engines).items()
        }
        found[width] = measure(learners, options.device, options.repetitions, options.updates)
    print(table(found))
    if options.output:
        write_json(options.output, found)


if __name__ == "__main__":
    main()
