"""`trimtab demo`: make a generalist, steer it on one task, and compare. The whole story in minutes."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from trimtab.adapters import PolicyConfig, UserError
from trimtab.adapters.checkpoint.identity import file_hash
from trimtab.policies.noise_samplers import base_noise
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpaceConfig
from trimtab.recipes.cli.adapt import AdaptConfig, check_run, steer, untrained_line
from trimtab.recipes.embedded_base.base import BaseConfig, cached_base
from trimtab.recipes.embedded_base.cloning import CloningConfig
from trimtab.recipes.support.console import default_cache, default_threads, new_output_dir
from trimtab.recipes.support.reporting import summaries, table, write_json
from trimtab.recipes.support.session import Session, describe, open_session
from trimtab.recipes.support.shared_configs import EvalConfig, MachineConfig
from trimtab.rl.algorithms import AlgorithmConfig, BestOfNConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.envs.hooks import base_tasks
from trimtab.rl.envs.metaworld import MetaworldStateConfig, resolve_task
from trimtab.rl.evaluation import Evaluation

# Options that mean what adapt's mean.
SHARED = ("rl", "noise", "train", "eval", "machine", "num_envs", "seed")


@dataclass
class DemoConfig:
    """``trimtab demo``."""

    # The task to steer; any of the base's tasks.
    task: str = "button-press-topdown-v3"
    # Fewer tasks and cloning steps than `trimtab base` takes, to be made in a minute.
    base: BaseConfig = field(
        default_factory=lambda: BaseConfig(
            "button-press-topdown-v3,hammer-v3,drawer-open-v3", cloning=CloningConfig(steps=1_900)
        )
    )
    # The default of `trimtab adapt`.
    rl: AlgorithmConfig = field(default_factory=BestOfNConfig)
    noise: NoiseSpaceConfig = field(default_factory=FullNoiseConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(env_steps=4_000))
    # Few episodes where the interval allows: 200 of base and steered policy, 50 of the other baselines.
    eval: EvalConfig = field(
        default_factory=lambda: EvalConfig(
            baseline_episodes=50, constant_candidates=8, constant_episodes=10, videos=2
        )
    )
    # Default of threads: OMP_NUM_THREADS, else all cores, because simulators take a fraction of the time.
    machine: MachineConfig = field(default_factory=MachineConfig)
    # Episodes of each of the base's other tasks, before and after.
    other_task_episodes: int = 10
    num_envs: int = 8
    # Seed of the steering run (the base has its own: --base.seed).
    seed: int = 0
    # Made bases are kept here; default: $TRIMTAB_CACHE, else ~/.cache/trimtab.
    cache_dir: Path | None = None
    # Default: outputs/demo/<date>/<time>.
    output_dir: Path | None = None

    def __post_init__(self) -> None:
        check_run(self.seed, self.num_envs)


def main(config: DemoConfig) -> None:
    started = time.perf_counter()
    config.task = resolve_task(config.task, "--task")
    base = config.base.resolved()
    if config.task not in base.tasks.split(","):
        raise UserError("--task", f"{config.task} is not among --base.tasks={base.tasks}")
    output = new_output_dir(config.output_dir, "demo")
    if config.machine.threads is None:
        config.machine.threads = default_threads(0)

    print(f"[1/3] a generalist that imitates operators of mixed skill on {len(base.tasks.split(','))} tasks")
    config.machine.apply()
    path = cached_base(base, config.cache_dir or default_cache())
    base_seconds = time.perf_counter() - started

    print(f"[2/3] steering it on {config.task}: it stays frozen, a noise actor learns")
    adapt = AdaptConfig(
        env=MetaworldStateConfig(task=config.task, episode_length=base.episode_length),
        policy=PolicyConfig(path=str(path), device="cpu"),
        output_dir=output,
        **{name: getattr(config, name) for name in SHARED},
    )
    session, folder = open_session(adapt.policy, adapt.env, adapt.eval, adapt.machine)
    print(describe(session, folder))
    sha256 = file_hash(folder)
    before = other_tasks(session, folder, config, "before")
    results, _, _ = steer(session, folder, adapt, output)

    print("[3/3] the base's other tasks, without the actor, once more")
    after = other_tasks(session, folder, config, "after")
    same = sha256 == file_hash(folder) and all(
        (before[task].successes == after[task].successes).all() for task in before
    )
    results["seconds"] |= {"base": round(base_seconds, 2), "total": round(time.perf_counter() - started, 2)}
    results["other_tasks"] = {"before": summaries(before), "after": summaries(after), "unchanged": same}
    write_json(output / "results.json", results)
    parameters = results["actor_parameters"]
    print(f"\n{table(results['policies'])}\n\n{untrained_line(results, config.noise.type)}")
    print(
        f"{config.task}: {results['env_steps']:,} environment steps ({results['training_episodes']} "
        f"episodes), {parameters:,} weights trained ({parameters * 4 / 1e3:.0f} kB), base file unchanged"
    )
    for task, found in after.items():
        won = f"{before[task].successes.sum()}/{len(found.seeds)} before"
        print(f"{task}: {won}, {found.successes.sum()}/{len(found.seeds)} after")
    print(f"{results['seconds']['total']:.0f} s in all; curve, videos, metrics and artefact in {output}")


def other_tasks(session: Session, folder: Path, config: DemoConfig, when: str) -> dict[str, Evaluation]:
    """Evaluate the untouched base on its other tasks, each with the same seeds every time."""
    found: dict[str, Evaluation] = {}
    others = [task for task in base_tasks(session.env, folder) if task != config.task]
    for task in others if config.other_task_episodes > 0 else ():
        other = Session(session.adapter, replace(session.env, task=task), session.eval, session.machine)
        seeds = session.eval.seeds[: config.other_task_episodes]
        with other.environments(len(seeds), 0) as vec:  # so few episodes are over before a worker has begun
            found[task] = other.evaluate(vec, base_noise, f"{task}, {when}", seeds)
    return found
