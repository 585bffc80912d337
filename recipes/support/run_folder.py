"""`--resume=true`: which run goes on, whether it is still the same run, and what it had measured before."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import draccus
import numpy as np
from safetensors import SafetensorError

from trimtab.adapters import UserError
from trimtab.adapters.errors import reason
from trimtab.recipes.support.option_dicts import Options, flatten, merge, read_options, value_at
from trimtab.recipes.support.repeat import repeatable, without_plugins
from trimtab.recipes.support.reporting import write_json
from trimtab.rl.evaluation import Evaluation
from trimtab.rl.runs.checkpoint import Checkpoint, CheckpointConfig, Checkpoints
from trimtab.rl.runs.processes import ProcessGroup

CONFIG, BASELINES, CHECKPOINTS, METRICS = "config.json", "baselines.json", "checkpoints", "metrics.jsonl"
# What may differ when a run goes on: where and how it is run, and how long.
FREE = ("checkpoint", "machine", "faults", "trackers", "policy.device", "train.env_steps")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)


def resumed(given: Options, path: Path | None) -> Path | None:
    """The file with the options of the run that ``--resume=true`` goes on with, if it does.

    ``--output_dir`` names the run, or the ``--config_path`` of a config.json in its folder or in one of its
    checkpoints, as with lerobot-train. Options that are not given are the run's own. A folder that does not
    exist yet, with all options given, begins a run: a job that is started again and again needs but one
    command.

    Args:
        given: options of the command line; gets ``output_dir``, and whether there is a run in ``resume``.
        path: of ``--config_path``.

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

    Args:
        path: the folder.
        config: of the run.
        identity: of its base policy.
        checkpoint: settings.
        world: the processes; the main one writes.
    """

    def __init__(
        self,
        path: Path,
        config: Any,
        identity: dict[str, Any],
        checkpoint: CheckpointConfig,
        world: ProcessGroup,
    ) -> None:
        self.path, self.world = path, world
        self.config = repeatable(draccus.encode(config))
        self.belongs = {"base": json.loads(json.dumps(identity)), "config": fixed(self.config)}
        self.checkpoints: Checkpoints | None = None
        if checkpoint.every:
            texts = {CONFIG: json.dumps(self.config, indent=2) + "\n"}
            self.checkpoints = Checkpoints(path / CHECKPOINTS, checkpoint, self.belongs, world, texts=texts)

    def begin(self, measured: dict[str, dict[str, Evaluation]], details: dict[str, Any]) -> None:
        """Write what is known before training.

        Args:
            measured: evaluations by task and policy.
            details: anything else to find again, as JSON values.
        """
        if self.world.main:
            content = {task: {n: encode(e) for n, e in by_name.items()} for task, by_name in measured.items()}
            write_json(self.path / BASELINES, {"base": self.belongs["base"], "measured": content, **details})
            self.write_config()

    def write_config(self) -> None:
        write_json(self.path / CONFIG, self.config)

    def baselines(self) -> tuple[dict[str, dict[str, Evaluation]], dict[str, Any]] | None:
        """What ``begin`` wrote; ``None`` where there is nothing that can be used."""
        try:
            content = json.loads((self.path / BASELINES).read_text(encoding="utf-8"))
            by_task = content.pop("measured").items()
            measured = {task: {n: decode(e) for n, e in by_name.items()} for task, by_name in by_task}
            return (measured, content) if content.pop("base") == self.belongs["base"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; lines about those that are not go to the console.

        Raises:
            UserError: it belongs to another base or config; the message names the difference.
        """
        if self.checkpoints is None:
            raise UserError("--checkpoint.every", "with 0 there are no checkpoints to go on from")
        found, notes = self.checkpoints.newest()
        for note in notes if self.world.main else ():
            print(note)
        if found is None:
            if self.world.main:
                print(f"no whole checkpoint in {self.checkpoints.folder}: training begins anew")
            return None
        check_belongs(found, self.belongs)
        if self.world.main:
            print(f"going on from {found.folder}, {found.env_steps:,} environment steps")
        return found


def check_belongs(checkpoint: Checkpoint, now: dict[str, Any]) -> None:
    """Refuse a checkpoint of another base or config.

    Raises:
        UserError: names the first difference.
    """
    then = checkpoint.belongs
    odd = sorted(k for k in then["base"] | now["base"] if then["base"].get(k) != now["base"].get(k))
    # Where the weights lie decides their hash in memory (a GPU's dtype) but not what they are.
    moved = {"weights_device"} if "weights_device" in odd else set()
    odd = [name for name in odd if name not in moved]
    if odd:
        raise UserError(
            "--policy.path", f"{checkpoint.folder} belongs to another base policy ({', '.join(odd)} differ)"
        )
    before, after = then["config"], now["config"]
    # Where a type differs, all of its options do.
    for name in sorted(before | after, key=lambda name: (not name.endswith(".type"), name)):
        if before.get(name) != after.get(name):
            raise UserError(
                f"--{name}",
                f"{checkpoint.folder} belongs to a run with {before.get(name)}, not {after.get(name)}; go on "
                "with that, or begin another run in another --output_dir",
            )


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
def disk_errors(path: Path) -> Iterator[None]:
    """A full or unwritable disk is for the user to mend.

    Raises:
        UserError: in place of the system's error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in DISK:
            raise
        raise UserError(
            "--output_dir",
            f"cannot write to {path} ({reason(error)}); what was written before is whole: make room, then go "
            "on with --resume=true",
        ) from error
