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
from trimtab.adapters.checkpoint.files import file_hash, resolve_folder
from trimtab.recipes.bench.compiled import compiled_table, run_compiled
from trimtab.recipes.bench.engine import run_engine
from trimtab.recipes.bench.methods import METHODS, Setup, run_base, run_method
from trimtab.recipes.bench.overhead import run_overhead
from trimtab.recipes.bench.processes import Job, processes_table, run_processes
from trimtab.recipes.bench.report import engine_table, overhead_table, write_samples
from trimtab.recipes.bench.updates import run_updates, updates_table
from trimtab.recipes.support.console import new_output_dir
from trimtab.recipes.support.reporting import write_json
from trimtab.recipes.support.session import EVALUATION_SEED, read_json
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.budget import MAX_SEED
from trimtab.rl.envs.metaworld import MetaworldStateConfig, check_episode_length, split_tasks
from trimtab.rl.envs.vector import ChunkVectorEnv

RECORD = "bench.json"
WHAT = ("samples", "engine", "overhead", "updates", "compile", "processes")
ON_GPU = ("samples", "engine", "updates")
DEVICES = ("cpu", "cuda")


@dataclass
class BenchConfig:
    """``trimtab bench``."""

    # samples: success against environment steps; engine: updates per second; overhead: time per chunk of a
    # steered policy over its base's; updates: time of an update of each algorithm; compile: the same with
    # --rl.engine=compile and without; processes: environment steps per second of two processes and of one.
    what: str = "samples"
    # Folder of a base policy that `trimtab base` or `trimtab demo` made.
    base: str = ""
    tasks: str = "button-press-topdown,hammer"
    # Comma-separated names; recipes/bench/README.md lists them.
    methods: str = "best_of_n,dsrl_sac_full,sb3_sac"
    # Comma-separated training seeds.
    seeds: str = "0,1,2,3,4"
    # Samples, engine, updates: where base and learners are, cpu or cuda.
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
    # Engine: widths of the networks, turns of each learner, updates in a turn, transitions in the replay.
    widths: str = "128,256"
    repetitions: int = 7
    updates: int = 100
    transitions: int = 2_000
    # Processes: the algorithm, with its defaults, and its updates per transition of each process.
    algorithm: str = "dsrl_sac"
    updates_per_transition: float = 2.0
    # Overhead: folder of the artefact that `trimtab adapt` wrote, and chunks of each policy.
    artefact: Path | None = None
    chunks: int = 300
    # An earlier one's finished runs are kept. Default: outputs/bench/<date>/<time>.
    output_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.what not in WHAT:
            raise UserError("--what", f"'{self.what}' is none of {', '.join(WHAT)}")
        if self.chunks < 2:
            raise UserError("--chunks", f"must be at least 2, got {self.chunks}")
        for name in (
            *("env_steps", "grid", "n_episodes", "base_episodes", "batch_size", "num_envs"),
            *("repetitions", "updates", "transitions"),
        ):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}", f"must be at least 1, got {getattr(self, name)}")
        for name in ("final_episodes", "workers"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name}", f"cannot be negative, got {getattr(self, name)}")
        if self.what == "samples" and self.grid > self.env_steps:
            raise UserError("--grid", f"{self.grid} leaves no point within --env_steps={self.env_steps}")
        check_episode_length(self.episode_length, "--episode_length")
        known = [name for name in AlgorithmConfig.get_known_choices() if name != "golden_ticket"]
        if self.algorithm not in known:
            raise UserError("--algorithm", f"'{self.algorithm}' is none of {', '.join(known)}")
        if not self.updates_per_transition > 0:
            raise UserError(
                "--updates_per_transition", f"must be positive, got {self.updates_per_transition}"
            )
        if self.device not in DEVICES:
            raise UserError("--device", f"'{self.device}' is none of {', '.join(DEVICES)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device", "'cuda' is not usable here; leave it out")
        if self.device == "cuda" and self.what not in ON_GPU:
            raise UserError("--device", f"'cuda' is for --what={', '.join(ON_GPU)}")
        self.method_list()
        numbers(self.widths, "--widths", 1, 8192)
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
    if config.what == "overhead":
        overhead(config)
        return
    if config.what in ("updates", "compile"):
        updates(config)
        return
    if not config.base:
        raise UserError("--base", "name the folder of a base policy; `trimtab base` makes one")
    torch.set_num_threads(1)
    folder = resolve_folder(config.base)
    tasks = split_tasks(config.tasks, "--tasks")
    for task in tasks:
        MetaworldStateConfig(task=task).check_base(folder)
    output = _output(config.output_dir)
    if config.what == "processes":
        processes(config, folder, tasks[0], output)
        return
    adapter = load_adapter(PolicyConfig(path=str(folder), device=config.device))
    if config.what == "engine":
        engine(config, adapter, tasks[0], output)
    else:
        samples(config, adapter, folder, tasks, output)


def _output(path: Path | None) -> Path:
    """The folder for the results: a new one, or an earlier bench's."""
    if path is None or not (path / RECORD).is_file():
        path = new_output_dir(path, "bench")
    write_json(path / RECORD, {"format": 1})
    return path


def _env(config: BenchConfig, task: str) -> EnvConfig:
    return MetaworldStateConfig(task=task, episode_length=config.episode_length)


def engine(config: BenchConfig, adapter: PolicyAdapter, task: str, output: Path) -> None:
    """Measure updates per second; write engine.json and engine.md."""
    widths = numbers(config.widths, "--widths", 1, 8192)
    found = run_engine(
        adapter,
        _env(config, task),
        widths,
        config.repetitions,
        config.updates,
        config.transitions,
        config.num_envs,
        config.workers,
        torch.device(config.device),
    )
    _write(output, "engine", found, engine_table(found))


def overhead(config: BenchConfig) -> None:
    """Measure what steering costs at inference; write overhead.json."""
    if config.artefact is None:
        raise UserError("--artefact", "name the artefact that `trimtab adapt` wrote")
    torch.set_num_threads(1)
    found = run_overhead(config.artefact.expanduser(), config.chunks)
    output = _output(config.output_dir)
    write_json(output / "overhead.json", found)
    print(f"{overhead_table(found)}\n\nall in {output}")


def updates(config: BenchConfig) -> None:
    """Measure what an update takes, of each algorithm or compiled and not; write updates.json and .md."""
    torch.set_num_threads(1)
    measured = numbers(config.widths, "--widths", 1, 8192), config.repetitions, config.updates
    if config.what == "compile":
        found = run_compiled(*measured)
        text = compiled_table(found)
    else:
        device = torch.device(config.device)
        found = run_updates(*measured, device)
        text = updates_table(found, device)
    _write(_output(config.output_dir), config.what, found, text)


def processes(config: BenchConfig, folder: Path, task: str, output: Path) -> None:
    """Measure what a second process gains; write processes.json and processes.md."""
    job = Job(
        base=str(folder),
        task=task,
        episode_length=config.episode_length,
        algorithm=config.algorithm,
        num_envs=config.num_envs,
        env_steps=config.env_steps,
        updates_per_transition=config.updates_per_transition,
        output=str(output / "process.json"),
    )
    found = run_processes(job, config.repetitions)
    _write(output, "processes", found, processes_table(found))


def _write(output: Path, name: str, found: dict[str, Any], text: str) -> None:
    write_json(output / f"{name}.json", found)
    (output / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nall in {output}")


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
