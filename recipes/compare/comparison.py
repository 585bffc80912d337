"""A comparison: which runs it has, where their records lie, and the report on them."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import draccus
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import UserError
from trimtab.adapters.checkpoint.folder import is_server
from trimtab.recipes.compare.bases import Base, env_of, names_task
from trimtab.recipes.compare.config import CompareConfig
from trimtab.recipes.compare.measure import measure_of
from trimtab.recipes.compare.methods import make_method
from trimtab.recipes.compare.report import write_report
from trimtab.recipes.compare.runs import Run
from trimtab.recipes.support.console import new_output_dir
from trimtab.recipes.support.option_dicts import TASK, filled, repeatable
from trimtab.recipes.support.reporting import read_json, write_json
from trimtab.recipes.support.session import Session
from trimtab.rl.envs.hooks import base_tasks, check_base, task_names
from trimtab.rl.runs.faults import stopping

RECORD, CHECKPOINTS = "compare_config.json", "-checkpoints"
REPORT_EVERY = 30.0  # seconds: short runs, and those that are there already, take less time than a report


class Comparison:
    """All runs of a comparison.

    Raises:
        UserError: the policy, a task or a method cannot take part.
    """

    def __init__(self, config: CompareConfig) -> None:
        self.config = config
        self.methods = {
            name: make_method(name, config.settings.get(name), config.reward) for name in config.names()
        }
        if is_server(config.policy.path) and (tuned := [n for n, one in self.methods.items() if one.tunes]):
            raise UserError(
                "--methods", f"what is on a policy server cannot be fine-tuned: leave out {', '.join(tuned)}"
            )
        self.bases = self._bases()
        self.tasks = list(self.bases)
        self.others: list[str] = []
        if config.other_episodes and not names_task(config.policy.path):
            folder = self.bases[self.tasks[0]].folder
            self.others = (
                base_tasks(config.env, folder)
                if config.other_tasks is None
                else self._tasks(config.other_tasks, "--other_tasks")
            )
            self._check_tasks(self.others, folder)
        elif config.other_tasks:
            raise UserError("--other_tasks", f"a base of its own for each task ({TASK}) knows no other task")
        if "task" in (config.observe.inputs or ()) and (self.others or len(self.tasks) > 1):
            raise UserError(
                "--observe.inputs",
                "an actor that is told its task cannot act on another; leave `task` out, or --tasks=ONE "
                "--other_episodes=0",
            )
        for name, method in self.methods.items():
            for task, base in self.bases.items():
                if "dataset" in method.uses and base.dataset is None:
                    raise UserError(
                        "--dataset.repo_id",
                        f"'{name}' learns from demonstrations{f' of {task}' if task else ''}: name a "
                        "LeRobotDataset, or leave it out of --methods",
                    )
        config.machine.apply()
        for task, base in self.bases.items():
            if not config.only or config.only.startswith(f"{task},"):  # a run of its own loads but its own
                self._check_budget(base)
        self.output = config.output_dir
        if self.output is None or not (self.output / RECORD).is_file():
            self.output = new_output_dir(self.output, "compare")
        self._sessions: dict[str, Session] = {}

    def _bases(self) -> dict[str, Base]:
        """The base of each task."""
        config, path = self.config, self.config.policy.path
        if not config.tasks and names_task([path, vars(config.env)]):
            raise UserError("--tasks", f"name the tasks that {TASK} stands for")
        tasks = self._tasks(config.tasks, "--tasks") or task_names(config.env) or [config.env.task or ""]
        places = {task: filled(path, task) for task in tasks}
        bases = {
            place: Base(replace(config.policy, path=place), config.dataset)
            for place in dict.fromkeys(places.values())
        }
        for task, place in places.items():
            self._check_tasks([task], bases[place].folder)
        return {task: bases[place] for task, place in places.items()}

    def _tasks(self, text: str, option: str) -> list[str]:
        """The tasks that ``text`` lists, each by its environment's name for it."""
        names = [name.strip() for name in text.split(",") if name.strip()]
        known = [task_names(env_of(self.config.env, name), option) or [name] for name in names]
        return list(dict.fromkeys(name for one in known for name in one))

    def _check_tasks(self, tasks: list[str], folder: Path | str) -> None:
        for task in tasks:
            check_base(env_of(self.config.env, task), folder)

    def _check_budget(self, base: Base) -> None:
        """Refuse what would not begin to learn."""
        steps = base.loaded.adapter.chunk_shape[0]
        for name, method in self.methods.items():
            chunks = method.chunks_before_learning()
            if chunks and chunks * steps >= self.config.env_steps:
                raise UserError(
                    "--env_steps",
                    f"{name} begins to learn after {chunks} chunks of {steps} steps; more than "
                    f"{chunks * steps} are needed, or leave it out of --methods",
                )

    def plan(self) -> Iterator[tuple[str, str, int | None]]:
        """Task, method and seed of every run, seed by seed; one run of what learns nothing."""
        for seed in (None, *self.config.seed_list()):
            for task in self.tasks:
                for name, method in self.methods.items():
                    if bool(method.uses) == (seed is not None):
                        yield task, name, seed

    def settings(self, task: str, name: str, seed: int | None) -> dict[str, Any]:
        """All that decides the outcome of a run, as JSON values."""
        config, method, base = self.config, self.methods[name], self.bases[task]
        loaded = draccus.encode(base.options)
        # The hash of the weights says it, or it decides nothing.
        for key in ("revision", "device", "tokenizer", "backbone", *(("path",) if base.sha256 else ())):
            loaded.pop(key, None)
        found = {
            "base_sha256": base.sha256,
            "base_files": base.files,
            "policy": loaded,
            "env": draccus.encode(env_of(config.env, task), EnvConfig),
            "method": method.settings(),
            "seed": seed,
            "others": [other for other in self.others if other != task],
            **{key: getattr(config, key) for key in ("n_episodes", "final_episodes", "other_episodes")},
        }
        for key in method.uses:
            found[key] = draccus.encode(base.dataset if key == "dataset" else getattr(config, key))
        if "dataset" in found:
            found["dataset"].pop("root", None)  # where it lies decides nothing
            found["dataset"]["sha256"] = base.dataset_sha256()
        return json.loads(json.dumps(found))

    def record(self, task: str, name: str, seed: int | None) -> dict[str, Any]:
        """What a run has found; it is made now if it is not there."""
        make = self._isolated if self.config.isolate and not self.config.only else self._make
        path, settings = self._file(task, name, seed, ".json"), self.settings(task, name, seed)
        found = once(path, settings, lambda: make(task, name, seed))
        shutil.rmtree(self._file(task, name, seed, CHECKPOINTS), ignore_errors=True)
        return {"task": task, "method": name, "seed": seed} | found

    def _make(self, task: str, name: str, seed: int | None) -> dict[str, Any]:
        """Make the run in this process."""
        config, method, base = self.config, self.methods[name], self.bases[task]
        if task not in self._sessions:
            self._sessions[task] = Session(
                base.loaded.adapter, env_of(config.env, task), config.episodes, config.machine, config.observe
            )
        session, label = self._sessions[task], f"{name}, {task}" + ("" if seed is None else f", seed {seed}")
        others = [other for other in self.others if other != task and (method.uses or name == "base")]
        with session.evaluation_environments() as vec:
            kept = self._file(task, name, seed, CHECKPOINTS), self.settings(task, name, seed)
            run = Run(config, session, base.loaded, vec, label, seed or 0, base.dataset, kept)
            path, video = self._file(task, name, seed, ""), seed in (None, config.seed_list()[0])
            return run.record(method, {other: env_of(config.env, other) for other in others}, path, video)

    def _isolated(self, task: str, name: str, seed: int | None) -> dict[str, Any]:
        """Make the run in a process of its own, which says itself what stops it."""
        with tempfile.TemporaryDirectory() as folder:
            options = Path(folder) / RECORD  # that in ``output`` may be of another command by now
            self._write_options(options)
            command = [sys.executable, "-m", "trimtab.recipes.cli", "compare", f"--output_dir={self.output}"]
            command += [f"--config_path={options}", only_option(task, name, seed)]
            if code := ended(command):
                raise SystemExit(code if code > 0 else 128 - code)  # a signal as shells say it
        return read_json(self._file(task, name, seed, ".json"))

    def _write_options(self, path: Path) -> None:
        write_json(path, repeatable(draccus.encode(self.config, CompareConfig)))

    def only(self, text: str) -> None:
        """Make one run, which ``all`` has asked for."""
        chosen = [run for run in self.plan() if run_name(*run) == text]
        if not chosen:
            raise UserError("--only", f"'{text}' is no run of this comparison; TASK,METHOD,SEED")
        self.record(*chosen[0])

    def all(self) -> str:
        """Make what is missing, report as it goes, and return the last report."""
        self._write_options(self.output / RECORD)
        runs: list[dict[str, Any]] = []
        plan, reported = list(self.plan()), float("-inf")
        for run in plan:
            runs.append(self.record(*run))
            if run[1] == "base":
                self._check_success(runs[-1])
            compared = (self.config.improved, self.config.reach) if run == plan[-1] else None
            if compared or time.monotonic() - reported > REPORT_EVERY:
                text, reported = self.report(runs, compared), time.monotonic()
        return f"\n{text}\nall in {self.output}"

    def _check_success(self, base: dict[str, Any]) -> None:
        """Refuse what learns from success on a task that reports none."""
        found, env = base["final"]["policy"], self.config.reward == "env"
        names = [name for name, method in self.methods.items() if method.needs_success()]
        if found["success_rate"] is None and names:
            listed, task = ", ".join(names), base["task"] or self.config.env.type
            mend = f"leave out {listed}" if env else "--reward=env learns from its own reward"
            raise UserError(
                "--methods" if env else "--reward",
                f"{task} reported no success in {found['episodes']} episodes, and {listed} learn from it; "
                f"{mend} (success by another name: --env.success=info.NAME, with --env.type=gym)",
            )

    def report(self, runs: list[dict[str, Any]], compared: tuple[str, str] | None = None) -> str:
        """Write the report on the runs so far; ``compared`` as for ``write_report``."""
        config = self.config
        bases = [
            (run["task"], measure_of([run]), run["final"]["policy"])
            for run in runs
            if run["method"] == "base"
        ]
        own = {task: base.text for task, base in self.bases.items()}
        facts = [f"base policy of {task}: {text}, the same in all of its runs" for task, text in own.items()]
        if not names_task(config.policy.path):
            facts = [f"base policy: {own[self.tasks[0]]}, the same in all runs"]
        facts += [
            f"environment: {config.env.type}; {config.env_steps:,} environment steps for every method that "
            f"learns from them, {config.num_envs} environments unless the method's source says otherwise",
            f"evaluated every {config.grid:,} steps on {config.n_episodes} episodes, and at the end on "
            f"{config.final_episodes} others; the same for all",
            *(f"{task}: the base has {measure.name} {measure.text(found)}" for task, measure, found in bases),
        ]
        if self.others:
            facts.append(f"other tasks: {', '.join(self.others)}, {config.other_episodes} episodes each")
        videos = [
            (f"{run['task']}: {run['method']}", path)
            for run in runs
            if (path := self._file(run["task"], run["method"], run["seed"], ".mp4")).is_file()
        ]
        return write_report(self.output, "Methods compared", facts, runs, videos, compared)

    def _file(self, task: str, name: str, seed: int | None, suffix: str) -> Path:
        """A file of one run, or without a suffix its folder."""
        run = name if seed is None else f"{name}-seed{seed}"
        return self.output / "runs" / (task or self.config.env.type) / f"{run}{suffix}"


def ended(command: list[str]) -> int:
    """Exit code of a process, less than 0 for a signal. One that ends this process ends that, too."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    heard = {*stopping()} - {signal.SIGINT}  # which reaches both from a terminal
    main = threading.current_thread() is threading.main_thread()  # Python hears signals there alone
    with subprocess.Popen(command) as process:
        before = {number: signal.signal(number, hand_on) for number in heard if main}
        try:
            return process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_name(task: str, name: str, seed: int | None) -> str:
    """A run as ``--only`` names it."""
    return f"{task},{name}" + ("" if seed is None else f",{seed}")


def only_option(task: str, name: str, seed: int | None) -> str:
    """The argument that names a run; quoted, for a task may be empty or hold what YAML takes for more."""
    return f"--only={json.dumps(run_name(task, name, seed))}"


def once(path: Path, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an earlier run found with the same settings, else what ``run`` finds, written to ``path``."""
    if path.is_file():
        found = read_json(path)
        if found["settings"] == settings:
            print(f"{path} is there already")
            return found
        print(f"{path} was made with other settings; running it again")
    found = {**run(), "settings": settings}
    write_json(path, found)
    print(f"{path} written", flush=True)
    return found
