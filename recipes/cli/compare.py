"""`trimtab compare`: runs what is missing, or reads run folders, and reports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import draccus
from lerobot.configs.default import DatasetConfig
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.folder import is_peft, is_server
from trimtab.adapters.checkpoint.identity import file_hash
from trimtab.policies.artefact import is_artefact
from trimtab.policies.observe import ObserveConfig
from trimtab.recipes.cli.bench import numbers, once
from trimtab.recipes.compare.folders import read_runs
from trimtab.recipes.compare.methods import DEMONSTRATIONS, FIXED, METHODS, Bout, check_budget, customised
from trimtab.recipes.compare.report import write_report
from trimtab.recipes.compare.summary import summarise
from trimtab.recipes.embedded_base.base import DEMONSTRATIONS as BASE_DATA
from trimtab.recipes.embedded_base.dataset import REPO_ID
from trimtab.recipes.support.console import new_output_dir
from trimtab.recipes.support.repeat import repeatable
from trimtab.recipes.support.reporting import rate_text, read_json, write_json
from trimtab.recipes.support.session import Session, base_of
from trimtab.recipes.support.shared_configs import EVALUATION_SEED, EpisodesConfig, MachineConfig
from trimtab.rl.envs.hooks import base_tasks, check_base, for_task, task_names
from trimtab.rl.seeds import MAX_SEED

RECORD = "compare_config.json"
ALL = "base,zero_noise,golden_ticket,steered,lora,lora_rollouts,residual,dsrl_sac_paper_short"


@dataclass
class CompareConfig:
    """``trimtab compare``."""

    # Report on these folders of `trimtab adapt`, `lora`, `eval` or `demo`; nothing is run then.
    runs: list[Path] = field(default_factory=list)
    # The base policy, and its environment.
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    env: EnvConfig | None = None
    # What actors and critics look at.
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    # Comma-separated tasks to specialise on, one after the other; default: --env.task.
    tasks: str = ""
    # Comma-separated names; recipes/compare/README.md lists them.
    methods: str = ALL
    # Changes to a method's settings, by its name: {steered: {noise: {type: repeat}}}.
    settings: dict[str, Any] = field(default_factory=dict)
    # How many seeds (3: 0, 1 and 2), or which, separated by commas.
    seeds: str = "3"
    # Environment steps of each run, and between two evaluations (a round of lora_rollouts; default: a tenth).
    env_steps: int = 20_000
    grid: int | None = None
    # Episodes of each of these evaluations, and of others at the end.
    n_episodes: int = 100
    final_episodes: int = 200
    # Demonstrations for `lora`; default: those that an embedded base was made from.
    dataset: DatasetConfig | None = None
    # Comma-separated tasks on which forgetting is measured; default: an embedded base's other tasks.
    other_tasks: str | None = None
    # Episodes on each of them, before and after.
    other_episodes: int = 40
    # Environments of an evaluation, and of training.
    batch_size: int = 50
    num_envs: int = 8
    machine: MachineConfig = field(default_factory=MachineConfig)
    # Episodes in the video of each method.
    videos: int = 4
    # Run each method in a process of its own, so that its memory and its CPU time are its own.
    isolate: bool = True
    # Make this one run and no report: TASK,METHOD,SEED (what such a process is called with).
    only: str = ""
    # An earlier one's finished runs are kept. Default: outputs/compare/<date>/<time>.
    output_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("env_steps", "grid", "n_episodes", "final_episodes", "batch_size", "num_envs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}", f"must be at least 1, got {value}")
        if self.grid is None:  # as many points, up to ten, as the budget has equal parts
            points = next(n for n in range(10, 0, -1) if self.env_steps % n == 0)
            self.grid = self.env_steps // points
        for name in ("other_episodes", "videos"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name}", f"cannot be negative, got {getattr(self, name)}")
        if self.env_steps % self.grid:
            raise UserError(
                "--grid", f"--env_steps={self.env_steps} must be a multiple of it, for an equal budget"
            )
        self.names()
        self.seed_list()
        for name in self.settings:
            if name not in METHODS:
                raise UserError(
                    "--settings", f"there is no method '{name}'; choose from {', '.join(METHODS)}"
                )

    def names(self) -> list[str]:
        """The methods, the base first: all others are compared with it."""
        names = [name.strip() for name in self.methods.split(",") if name.strip()]
        for name in names:
            if name not in METHODS:
                raise UserError("--methods", f"there is no '{name}'; choose from {', '.join(METHODS)}")
        return list(dict.fromkeys(["base", *names]))

    def seed_list(self) -> list[int]:
        """The training seeds."""
        text = self.seeds.strip()
        if text.isdecimal() and 0 < int(text) <= MAX_SEED:
            return list(range(int(text)))
        return numbers(self.seeds, "--seeds", 0, MAX_SEED)


def main(config: CompareConfig) -> None:
    if config.runs:
        report_folders(config)
        return
    if not config.policy.path:
        raise UserError("--policy.path", "name the base policy, or with --runs=[...] folders to report on")
    if config.env is None:
        raise UserError("--env.type", "name the environment, for instance --env.type=metaworld_state")
    contest = Contest(config)
    if config.only:
        contest.only(config.only)
        return
    print(contest.all())


def report_folders(config: CompareConfig) -> None:
    """Report on runs that are there."""
    runs, videos = read_runs([path.expanduser() for path in config.runs])
    output = new_output_dir(config.output_dir, "compare")
    facts = [
        f"{len(config.runs)} run folders: {', '.join(str(path) for path in config.runs)}",
        "while learning, success is that of the last training episodes (adapt) or of each round's evaluation "
        "(lora): curves and steps to a level of the two kinds are not alike",
    ]
    output.mkdir(parents=True, exist_ok=True)
    text = write_report(output, "Comparison of runs", facts, runs, summarise(runs), videos)
    print(f"{text}\nall in {output}")


class Contest:
    """All runs of a comparison: which there are, and where their records lie.

    Args:
        config: settings.
    """

    def __init__(self, config: CompareConfig) -> None:
        self.config = config
        self.methods = {name: customised(name, config.settings.get(name)) for name in config.names()}
        self.server = is_server(config.policy.path)
        tuned = [name for name, method in self.methods.items() if method and method.tuning]
        if self.server and tuned:
            raise UserError(
                "--methods", f"what is on a policy server cannot be fine-tuned: leave out {', '.join(tuned)}"
            )
        if is_artefact(config.policy.path):
            raise UserError("--policy.path", f"{config.policy.path} is already steered; name its base policy")
        self.folder = base_of(config.policy)
        if not self.server and is_peft(self.folder):
            raise UserError(
                "--policy.path", f"{self.folder} is a LoRA adapter; name the policy that it adapts"
            )
        kept = None if self.server else self.folder  # what an embedded base keeps beside its weights
        self.tasks = self._named(config.tasks or config.env.task or "", "--tasks") or [config.env.task or ""]
        self.others = self._other_tasks()
        if "task" in (config.observe.inputs or ()) and (self.others or len(self.tasks) > 1):
            raise UserError(
                "--observe.inputs",
                "an actor that is told its task cannot act on another; leave `task` out, or --tasks=ONE "
                "--other_episodes=0",
            )
        self.dataset = config.dataset
        if self.dataset is None and kept and (kept / BASE_DATA).is_dir():
            self.dataset = DatasetConfig(REPO_ID, root=str(kept / BASE_DATA))
        if DEMONSTRATIONS in self.methods and self.dataset is None:
            raise UserError(
                "--dataset.repo_id",
                f"'{DEMONSTRATIONS}' learns from demonstrations: name a LeRobotDataset, or leave it out of "
                "--methods",
            )
        config.machine.apply()
        self.adapter = load_adapter(config.policy)
        for name, method in self.methods.items():
            check_budget(name, method, config.env_steps, self.adapter.chunk_shape[0])
        # A server shows no weights.
        self.base_sha256 = None if self.server else file_hash(self.folder)
        output = config.output_dir
        if output is None or not (output / RECORD).is_file():
            output = new_output_dir(output, "compare")
        self.output = output

    def _named(self, text: str, option: str) -> list[str]:
        """The tasks that ``text`` lists, checked where that is possible."""
        env = self.config.env
        names = task_names(for_task(env, text), option)
        for name in names:
            check_base(for_task(env, name), self.folder)
        return names or [name.strip() for name in text.split(",") if name.strip()]

    def _other_tasks(self) -> list[str]:
        config = self.config
        if not config.other_episodes:
            return []
        if config.other_tasks is not None:
            return self._named(config.other_tasks, "--other_tasks") if config.other_tasks.strip() else []
        return base_tasks(config.env, self.folder)

    def bout(self, task: str) -> Bout:
        """The runs of one task."""
        config = self.config
        env = replace(config.env, task=task) if task else config.env
        episodes = EpisodesConfig(
            n_episodes=config.n_episodes, batch_size=config.batch_size, videos=config.videos
        )
        final = EVALUATION_SEED + config.n_episodes
        return Bout(
            session=Session(self.adapter, env, episodes, config.machine, config.observe),
            policy=config.policy,
            folder=self.folder,
            env_steps=config.env_steps,
            grid=config.grid,
            num_envs=config.num_envs,
            seeds=list(range(EVALUATION_SEED, final)),
            final_seeds=list(range(final, final + config.final_episodes)),
            others={name: replace(config.env, task=name) for name in self.others if name != task},
            other_seeds=list(range(EVALUATION_SEED, EVALUATION_SEED + config.other_episodes)),
            dataset=self.dataset,
            where=self._runs(task),
            filmed=config.seed_list()[0],
        )

    def plan(self) -> Iterator[tuple[str, str, int | None]]:
        """Task, method and seed of every run, seed by seed."""
        for task in self.tasks:
            for name in FIXED:
                if name in self.methods:
                    yield task, name, None
        for seed in self.config.seed_list():
            for task in self.tasks:
                for name in self.methods:
                    if name not in FIXED:
                        yield task, name, seed

    def settings(self, task: str, name: str, seed: int | None) -> dict[str, Any]:
        """All that decides the outcome of a run, as JSON values."""
        config, method = self.config, self.methods[name]
        loaded = draccus.encode(config.policy)
        # The hash of the weights says it, or it decides nothing.
        for key in ("revision", "device", "tokenizer", "backbone", *(() if self.server else ("path",))):
            loaded.pop(key, None)
        found = {
            "base_sha256": self.base_sha256,
            "policy": loaded,
            "env": draccus.encode(replace(config.env, task=task) if task else config.env, EnvConfig),
            "method": method.settings() if method else name,
            "seed": seed,
            "first_seed": EVALUATION_SEED,
            "others": [other for other in self.others if other != task],
            **{key: getattr(config, key) for key in ("n_episodes", "final_episodes", "other_episodes")},
        }
        if method is not None and method.tuning is None:
            found["observe"] = draccus.encode(config.observe)
        if method is not None and name != DEMONSTRATIONS:
            found |= {key: getattr(config, key) for key in ("env_steps", "grid", "num_envs")}
        if name == DEMONSTRATIONS:
            found["dataset"] = draccus.encode(self.dataset)
            found["dataset"].pop("root", None)  # where it lies decides nothing
        return json.loads(json.dumps(found))

    def record(self, task: str, name: str, seed: int | None, bouts: dict[str, Bout]) -> dict[str, Any]:
        """What a run has found; it is made now if it is not there."""
        path = self._place(task, name, seed, "json")

        def run() -> dict[str, Any]:
            if self.config.isolate and not self.config.only:
                return self._isolated(task, name, seed, path)
            if task not in bouts:
                bouts[task] = self.bout(task)
            bout, method = bouts[task], self.methods[name]
            return bout.fixed(name) if seed is None else bout.run(name, method, seed)

        return {"task": task, "method": name, "seed": seed} | once(path, self.settings(task, name, seed), run)

    def _isolated(self, task: str, name: str, seed: int | None, path: Path) -> dict[str, Any]:
        """Make the run in a process of its own.

        Raises:
            UserError: what stopped it there.
        """
        only = f"--only={task},{name}" + ("" if seed is None else f",{seed}")
        command = [sys.executable, "-m", "trimtab.recipes.cli", "compare"]
        command += [f"--config_path={self.output / RECORD}", only, f"--output_dir={self.output}"]
        ran = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if ran.returncode:
            last = [line for line in ran.stderr.splitlines() if "error: " in line]
            if ran.returncode == 2 and last:
                option, _, message = last[-1].split("error: ", 1)[1].partition(": ")
                raise UserError(option, message)
            raise RuntimeError(f"the run {only} ended with {ran.returncode}:\n{ran.stderr}")
        return read_json(path)

    def only(self, text: str) -> None:
        """Make one run, which ``all`` has asked for."""
        task, name, seed = (*text.split(","), "", "")[:3]
        chosen = task, name, int(seed) if seed.isdecimal() else None
        if chosen not in list(self.plan()):
            raise UserError("--only", f"'{text}' is no run of this comparison; TASK,METHOD,SEED")
        self.record(*chosen, {})

    def all(self) -> str:
        """Make what is missing, report after each run, and return the last report."""
        config = self.config
        again = repeatable(draccus.encode(config, CompareConfig))
        again = {k: v for k, v in again.items() if v is not None and k not in ("output_dir", "only")}
        write_json(self.output / RECORD, json.loads(json.dumps(again, default=str)))
        bouts: dict[str, Bout] = {}
        runs: list[dict[str, Any]] = []
        text = ""
        for task, name, seed in self.plan():
            runs.append(self.record(task, name, seed, bouts))
            text = self.report(runs)
        return f"\n{text}\nall in {self.output}"

    def report(self, runs: list[dict[str, Any]]) -> str:
        """Write the report on the runs so far."""
        config = self.config
        bases = {run["task"]: run["final"]["policy"] for run in runs if run["method"] == "base"}
        where = f"weights {self.base_sha256[:12]}" if self.base_sha256 else config.policy.path
        facts = [
            f"base policy: {self.adapter.policy_type}, {where}, the same in all runs",
            f"environment: {config.env.type}; {config.env_steps:,} environment steps for every method that "
            f"learns from them, {config.num_envs} environments unless the method's source says otherwise",
            f"evaluated every {config.grid:,} steps on {config.n_episodes} episodes, and at the end on "
            f"{config.final_episodes} others; the same for all",
            *(f"{task}: the base succeeds in {rate_text(found)}" for task, found in bases.items()),
        ]
        if self.others:
            facts.append(f"other tasks: {', '.join(self.others)}, {config.other_episodes} episodes each")
        videos = [
            (f"{run['task']}: {run['method']}", path)
            for run in runs
            if run["seed"] in (None, config.seed_list()[0])
            and (path := self._place(run["task"], run["method"], run["seed"], "mp4")).is_file()
        ]
        return write_report(self.output, "Steering and its rivals", facts, runs, summarise(runs), videos)

    def _runs(self, task: str) -> Path:
        """The folder of a task's runs."""
        return self.output / "runs" / (task or self.config.env.type)

    def _place(self, task: str, name: str, seed: int | None, suffix: str) -> Path:
        """A file of one run."""
        return self._runs(task) / (f"{name}.{suffix}" if seed is None else f"{name}-seed{seed}.{suffix}")
