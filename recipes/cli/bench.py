"""`trimtab bench`: runs what is missing, and reports."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import PolicyAdapter, PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.folder import resolve_folder
from trimtab.adapters.checkpoint.identity import file_hash
from trimtab.recipes.bench.methods import METHODS, Setup, run_base, run_method
from trimtab.recipes.bench.report import write_samples
from trimtab.recipes.support.console import new_output_dir
from trimtab.recipes.support.reporting import read_json, write_json
from trimtab.recipes.support.shared_configs import EVALUATION_SEED
from trimtab.rl.envs.metaworld import MetaworldStateConfig, check_episode_length, split_tasks
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.seeds import MAX_SEED

RECORD = "bench.json"
DEVICES = ("cpu", "cuda")


@dataclass
class BenchConfig:
    """``trimtab bench``."""

    # Folder of a base policy that `trimtab base` or `trimtab demo` made.
    base: str = ""
    tasks: str = "button-press-topdown,hammer"
    # Comma-separated names; recipes/bench/README.md lists them.
    methods: str = "best_of_n,dsrl_sac_full"
    # Comma-separated training seeds.
    seeds: str = "0,1,2,3,4"
    # Where base and learners are, cpu or cuda.
    device: str = "cpu"
    # Environment steps of each run.
    env_steps: int = 20_000
    # Environment steps between two evaluations.
    grid: int = 2_000
    # Episodes of each evaluation; all methods and points get the same ones.
    n_episodes: int = 100
    # Episodes of the evaluation at the end of a run, on other seeds (0: none) ...
    final_episodes: int = 500
    # ... and of the base, beginning with those of the grid.
    base_episodes: int = 300
    # Environments of an evaluation, and of training.
    batch_size: int = 50
    num_envs: int = 8
    episode_length: int = 160
    # Simulator processes of training and of evaluation (0: none).
    workers: int = 1
    # An earlier one's finished runs are kept. Default: outputs/bench/<date>/<time>.
    output_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in (*("env_steps", "grid", "n_episodes", "base_episodes", "batch_size", "num_envs"),):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}", f"must be at least 1, got {getattr(self, name)}")
        for name in ("final_episodes", "workers"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name}", f"cannot be negative, got {getattr(self, name)}")
        if self.grid > self.env_steps:
            raise UserError("--grid", f"{self.grid} leaves no point within --env_steps={self.env_steps}")
        check_episode_length(self.episode_length, "--episode_length")
        if self.device not in DEVICES:
            raise UserError("--device", f"'{self.device}' is none of {', '.join(DEVICES)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device", "'cuda' is not usable here; leave it out")
        self.method_list()
        numbers(self.seeds, "--seeds", 0, MAX_SEED)

    def method_list(self) -> list[str]:
        names = [name.strip() for name in self.methods.split(",") if name.strip()]
        for name in names:
            if name not in METHODS:
                raise UserError("--methods", f"there is no '{name}'; choose from {', '.join(METHODS)}")
        if not names:
            raise UserError("--methods", f"name at least one of {', '.join(METHODS)}")
        return list(dict.fromkeys(names))


def numbers(text: str, option: str, low: int, high: int) -> list[int]:
    """The whole numbers that ``text`` lists by commas, checked and each once."""
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or not all(low <= number <= high for number in found):
        raise UserError(option, f"is a list such as 0,1,2 of numbers from {low} to {high}, got '{text}'")
    return list(dict.fromkeys(found))


def main(config: BenchConfig) -> None:
    if not config.base:
        raise UserError("--base", "name the folder of a base policy; `trimtab base` makes one")
    torch.set_num_threads(1)
    folder = resolve_folder(config.base)
    tasks = split_tasks(config.tasks, "--tasks")
    for task in tasks:
        MetaworldStateConfig(task=task).check_base(folder)
    output = _output(config.output_dir)
    adapter = load_adapter(PolicyConfig(path=str(folder), device=config.device))
    samples(config, adapter, folder, tasks, output)


def _output(path: Path | None) -> Path:
    """The folder for the results: a new one, or an earlier bench's."""
    if path is None or not (path / RECORD).is_file():
        path = new_output_dir(path, "bench")
    write_json(path / RECORD, {"format": 1})
    return path


def _env(config: BenchConfig, task: str) -> EnvConfig:
    return MetaworldStateConfig(task=task, episode_length=config.episode_length)


def samples(
    config: BenchConfig, adapter: PolicyAdapter, folder: Path, tasks: list[str], output: Path
) -> None:
    """Make every run that is not there yet, seed by seed, and report after each."""
    methods = {name: METHODS[name].settings() for name in config.method_list()}
    seeds = numbers(config.seeds, "--seeds", 0, MAX_SEED)
    shared: dict[str, Any] = {"base_sha256": file_hash(folder), "episode_length": config.episode_length}
    if config.device != DEVICES[0]:  # what a run without it was made on
        shared["device"] = config.device
    bases: dict[str, dict[str, Any]] = {}
    runs: list[dict[str, Any]] = []
    text = ""
    for seed in seeds:
        for task in tasks:
            with Task(config, adapter, folder, task) as one:
                where = output / "runs" / task
                mine = shared | {"task": task, "first_seed": EVALUATION_SEED}
                if task not in bases:
                    settings = mine | {"episodes": config.base_episodes}
                    bases[task] = once(where / "base.json", settings, one.base)["base"]
                for name, method in methods.items():
                    settings = mine | {
                        **{key: getattr(config, key) for key in ("env_steps", "grid", "num_envs")},
                        **{"n_episodes": config.n_episodes, "final_episodes": config.final_episodes},
                        **{"seed": seed, "method": method},
                    }
                    run = once(where / f"{name}-seed{seed}.json", settings, partial(one.run, name, seed))
                    runs.append({"task": task, "method": name, "seed": seed} | run)
                    text = write_samples(output, runs, bases, config.env_steps)
    print(f"{text}\nall in {output}")


class Task:
    """The setup of one task, whose evaluation environments start when a run first needs them."""

    def __init__(self, config: BenchConfig, adapter: PolicyAdapter, folder: Path, task: str) -> None:
        self.config, self.adapter, self.folder, self.env = config, adapter, folder, _env(config, task)
        self._setup: Setup | None = None

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._setup is not None:
            self._setup.vec.close()

    def base(self) -> dict[str, Any]:
        """The run of the base."""
        seeds = list(range(EVALUATION_SEED, EVALUATION_SEED + self.config.base_episodes))
        return {"base": run_base(self.setup(), seeds)}

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """The run of a method."""
        label = f"{name}, {self.env.task}, seed {seed}"
        return run_method(METHODS[name], self.setup(), seed, label)

    def setup(self) -> Setup:
        """Start the evaluation environments, once."""
        config = self.config
        if self._setup is None:
            count = min(config.batch_size, config.n_episodes)
            vec = ChunkVectorEnv(self.env, count, config.workers, self.adapter.n_obs_steps)
            final = EVALUATION_SEED + config.n_episodes
            self._setup = Setup(
                adapter=self.adapter,
                folder=self.folder,
                env=self.env,
                vec=vec,
                env_steps=config.env_steps,
                grid=config.grid,
                seeds=list(range(EVALUATION_SEED, final)),
                final_seeds=list(range(final, final + config.final_episodes)),
                num_envs=config.num_envs,
                workers=config.workers,
                policy=PolicyConfig(path=str(self.folder), device=config.device),
            )
        return self._setup


def settings_hash(settings: dict[str, Any]) -> str:
    """SHA-256 of what decides a run's outcome."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def once(path: Path, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an earlier bench found with the same settings, else what ``run`` finds, written to ``path``."""
    wanted = settings_hash(settings)
    if path.is_file():
        found = read_json(path)
        if found["hash"] == wanted:
            print(f"{path} is there already")
            return found
        print(f"{path} was made with other settings; running it again")
    found = {**run(), "settings": settings, "hash": wanted}
    write_json(path, found)
    print(f"{path} written", flush=True)
    return found
