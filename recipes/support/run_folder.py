"""`--resume=true`: which run goes on, whether it is still the same run, and what it had measured before."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import draccus
import numpy as np
from draccus.utils import flatten
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from trimtab.adapters import UserError
from trimtab.adapters.checkpoint.folder import is_server
from trimtab.adapters.checkpoint.identity import same_answer
from trimtab.adapters.errors import DISK, reason
from trimtab.recipes.support.console import say
from trimtab.recipes.support.option_dicts import (
    Options,
    merge,
    read_options,
    repeatable,
    value_at,
    without_plugins,
)
from trimtab.recipes.support.reporting import read_json, write_json
from trimtab.rl.envs.vector import WorkerLost
from trimtab.rl.evaluation import Evaluation
from trimtab.rl.runs.checkpoint import Checkpoint, Checkpoints
from trimtab.rl.runs.processes import ProcessGroup

CONFIG, BASELINES, CHECKPOINTS, METRICS = "config.json", "baselines.json", "checkpoints", "metrics.jsonl"
# Of a robot: how it is reached, and who stands beside it.
STATION = (
    "robot",
    "teleop",
    "listen",
    "token",
    "person",
    "person_options",
    "packages",
    "park_pose",
)
# What may differ when a run goes on: where and how it is run, and how long.
FREE = (
    *("checkpoint", "machine", "faults", "trackers", "policy.device", "train.env_steps", "train.episodes"),
    "from_episodes",
    *(f"env.{name}" for name in STATION),
    "policy.remote.timeout",
)
ONLINE = ("env", "eval", "num_envs")  # what a run without an environment has not used


def resumed(given: Options, path: Path | None) -> Path | None:
    """The file with the options of the run that ``--resume=true`` goes on with, if it does; else ``path``.

    ``--output_dir`` names the run, or the ``--config_path`` of a config.json in its folder or in one of its
    checkpoints, as with lerobot-train. Options that are not given are the run's own. A folder that does not
    exist yet, with all options given, begins a run: a job that is started again and again needs but one
    command. ``given`` gets ``output_dir``, and whether there is a run in ``resume``.

    Raises:
        UserError: there is no such run.
    """
    said = merge(read_options(path) if path else {}, given)
    if str(said.get("resume")).lower() != "true":
        return path
    folder = Path(said["output_dir"]).expanduser() if said.get("output_dir") else None
    if folder is None and path:
        parent = path.expanduser().absolute().parent
        folder = next((up for up in (parent, parent.parent.parent) if (up / CHECKPOINTS).is_dir()), None)
    if folder is None:
        raise UserError(
            "--resume", "name the run to go on with: --output_dir=, or --config_path= in its folder"
        )
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if empty and value_at(said, "env.type") is not None:
        print(f"{folder} holds no run yet: it begins")
        given["resume"] = False
        return path
    if not (folder / CONFIG).is_file():
        raise UserError("--resume", f"{folder} holds no run to go on with, it lacks {CONFIG}")
    given |= {"resume": True, "output_dir": str(folder)}
    return path or folder / CONFIG


class RunFolder:
    """The folder of a steering run: what it is, what it had measured, and its checkpoints.

    It belongs to an ``AdaptConfig`` and the ``identity`` of a base policy; ``world``'s main process writes.
    """

    def __init__(self, path: Path, config: Any, identity: dict[str, Any], world: ProcessGroup) -> None:
        self.path, self.world = path, world
        self.config = repeatable(draccus.encode(config))
        self.belongs = {"base": json.loads(json.dumps(identity)), "config": fixed(self.config)}
        self.checkpoints: Checkpoints | None = None
        if config.checkpoint.every:
            texts, folder = {CONFIG: json.dumps(self.config, indent=2) + "\n"}, path / CHECKPOINTS
            self.checkpoints = Checkpoints(folder, config.checkpoint, self.belongs, world, texts=texts)

    def _budget(self) -> float:
        """The environment steps that the run was to take when it was last begun."""
        try:
            return float(read_json(self.path / CONFIG)["train"]["env_steps"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def begin(self, measured: dict[str, dict[str, Evaluation]], details: dict[str, Any]) -> None:
        """Write what is known before training: evaluations by task and policy, and ``details`` (JSON)."""
        if self.world.main:
            content = {task: {n: encode(e) for n, e in by_name.items()} for task, by_name in measured.items()}
            write_json(self.path / BASELINES, {"base": self.belongs["base"], "measured": content, **details})
            write_json(self.path / CONFIG, self.config)

    def baselines(self) -> tuple[dict[str, dict[str, Evaluation]], dict[str, Any]] | None:
        """What ``begin`` wrote; ``None`` where there is nothing that can be used."""
        try:
            content = read_json(self.path / BASELINES)
            by_task = content.pop("measured").items()
            measured = {task: {n: decode(e) for n, e in by_name.items()} for task, by_name in by_task}
            return None if differing(content.pop("base"), self.belongs["base"]) else (measured, content)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint of this run; lines about those that are not go to the console."""
        if self.checkpoints is None:
            raise UserError("--checkpoint.every", "with 0 there are no checkpoints to go on from")
        found, notes = self.checkpoints.newest()
        for note in notes:
            say(note)
        if found is None:
            say(f"no whole checkpoint in {self.checkpoints.folder}: training begins anew")
            return None
        self.check(found)
        say(f"going on from {found.folder}, {found.env_steps:,} environment steps")
        return found

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint of another base or config; the message names the first difference."""
        then, now, where = checkpoint.belongs, self.belongs, checkpoint.folder
        if names := ", ".join(sorted(differing(then["base"], now["base"]))):
            raise UserError("--policy.path", f"{where} belongs to another base policy ({names} differ)")
        before, after = dict(then["config"]), dict(now["config"])
        if all(is_server(one.get("policy.path") or "") for one in (before, after)):
            before["policy.path"] = after["policy.path"]  # wherever the same policy is served
        said = self.config["train"]
        spent, budget = checkpoint.env_steps, said["env_steps"]
        if not said["episodes"] and budget < min(spent, self._budget()):
            raise UserError("--train.env_steps", f"{self.path} has spent {spent:,} of them; name more")
        # Where a type differs, all of its options do.
        if before.get("env.type") == "none":  # learnt from demonstrations: any environment may follow
            before, after = (
                {name: value for name, value in one.items() if name.split(".")[0] not in ONLINE}
                for one in (before, after)
            )
        for name in sorted(before | after, key=lambda name: (not name.endswith(".type"), name)):
            if before.get(name) != after.get(name):
                raise UserError(
                    f"--{name}",
                    f"{where} belongs to a run with {before.get(name)}, not {after.get(name)}; go on with "
                    "that, or begin another run in another --output_dir",
                )


def differing(then: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """By what names two identities of a base differ.

    Where the weights lie decides their hash in memory (a GPU's dtype) but not what they are, and a policy
    server may round.
    """
    odd = {name for name in then | now if then.get(name) != now.get(name)} - {"weights_device"}
    if then.get("answer") and now.get("answer") and same_answer(then, now):
        odd -= {"answer", "tolerance"}
    return odd


class Hold(AbstractContextManager["Hold"]):
    """Keeps other runs out of a run's folder, from ``take`` on."""

    def __init__(self, path: Path, world: ProcessGroup) -> None:
        self._path, self._world, self._lock = path, world, FileLock(path / ".lock")

    def take(self) -> None:
        """A ``UserError`` where another run is going on there."""
        free = True
        if self._world.main and not self._lock.is_locked:
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                free = False
        if not all(self._world.gather(free)):
            raise UserError("--output_dir", f"another process runs in {self._path}; wait for it, or stop it")

    def __exit__(self, *exc: object) -> None:
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()


def fixed(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config, by dotted names, without what may differ when it goes on."""
    options = flatten(without_plugins(config))
    return {n: v for n, v in options.items() if not any(f"{n}.".startswith(f"{free}.") for free in FREE)}


def encode(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON values, without its frames."""
    values = {name: value for name, value in vars(evaluation).items() if name != "frames"}
    return {n: value.tolist() if isinstance(value, np.ndarray) else value for n, value in values.items()}


def decode(values: dict[str, Any]) -> Evaluation:
    """The evaluation that ``encode`` was given."""
    arrays = {name: np.array(values[name]) for name in ("successes", "steps", "returns") if values[name]}
    return Evaluation(**{**values, **arrays, "info_keys": tuple(values["info_keys"])})


@contextmanager
def run_errors(path: Path, resumed_by: str = "--resume=true") -> Iterator[None]:
    """A full or unwritable disk and a simulator that is lost are for the user to mend: a ``UserError``."""
    try:
        yield
    except WorkerLost as error:
        raise UserError("--env.type", reason(error, last=True)) from error
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in DISK:
            raise
        raise UserError(
            "--output_dir",
            f"cannot write to {path} ({reason(error)}); what was written before is whole: make room, then go "
            f"on with {resumed_by}",
        ) from error
