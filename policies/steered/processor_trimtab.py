"""Processors of a steered policy: those of its base, copied with what the base was loaded with.

LeRobot's commands run them around the policy, so that normalisation is the base's own; the policy works on
normalised batches and returns normalised actions.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lerobot.configs import PreTrainedConfig
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    EnvTransition,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
    RenameObservationsProcessorStep,
    TransitionKey,
    policy_action_to_transition,
    transition_to_policy_action,
)

from trimtab.adapters import PolicyAdapter, PolicyConfig, UserError
from trimtab.adapters.checkpoint.files import POSTPROCESSOR, PREPROCESSOR, state_files
from trimtab.adapters.checkpoint.folder import is_server
from trimtab.adapters.checkpoint.processors import RENAME_STEP, load_processors, processor_files
from trimtab.policies.steered.configuration_trimtab import TrimtabConfig

OWN_RENAME_STEP = "trimtab_rename_observations"
RAW_TASK = "trimtab_task"  # the instructions, before the base's processors make a prompt of them


@ProcessorStepRegistry.register(OWN_RENAME_STEP)
@dataclass
class BaseRenameStep(RenameObservationsProcessorStep):
    """The renaming that the base was steered with, and the instructions for a noise actor that looks at them.

    A step of its own name, for LeRobot's commands put their ``--rename_map``, which is empty by default,
    instead of the base's.
    """

    keep_task: bool = False

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        new = super().__call__(transition)
        data = new.get(TransitionKey.COMPLEMENTARY_DATA) or {}
        if self.keep_task and data.get("task") is not None:
            task = data["task"]
            new[TransitionKey.COMPLEMENTARY_DATA] = {
                **data,
                RAW_TASK: [task] if isinstance(task, str) else list(task),
            }
        return new

    def get_config(self) -> dict[str, Any]:
        return {"rename_map": self.rename_map, "keep_task": self.keep_task}


def make_trimtab_pre_post_processors(
    config: TrimtabConfig, dataset_stats: dict[str, Any] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Processors for a config without saved ones: those that its base was saved with.

    LeRobot calls this where it is given no folder; from an artefact's folder it reads the files there.

    Args:
        config: of the steered policy.
        dataset_stats: not used: the base's statistics are part of what was steered.

    Raises:
        UserError: the base is not where the config says.
    """
    location = config.base.location(Path(config.pretrained_path or "."))
    if is_server(location):
        return plain_processors(config.device)
    base_config = PreTrainedConfig.from_pretrained(str(location))
    base_config.device = config.device
    return load_processors(base_config, Path(location))


def plain_processors(device: str | None) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Processors that normalise nothing, for a policy server, which does so itself."""
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=device or "cpu"),
    ]
    return (
        PolicyProcessorPipeline(steps=before, name=Path(PREPROCESSOR).stem),
        PolicyProcessorPipeline(
            steps=[DeviceProcessorStep(device="cpu")],
            name=Path(POSTPROCESSOR).stem,
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        ),
    )


def write_processors(
    folder: Path, adapter: PolicyAdapter, options: PolicyConfig, base_folder: Path | str
) -> None:
    """Write into ``folder`` the processors that LeRobot is to run around the steered base.

    Args:
        folder: of the artefact.
        adapter: the loaded base.
        options: how it was loaded: a tokenizer, backbone or renaming named there is written in.
        base_folder: the base's folder, or the address of its server.
    """
    if is_server(str(base_folder)):
        for pipeline in plain_processors(adapter.device.type):
            pipeline.save_pretrained(folder)
        return
    here: dict[str, Any] = {  # LeRobot's commands may run in another folder
        name: str(Path(value).expanduser().resolve())
        for name in ("tokenizer", "backbone")
        if (value := getattr(options, name)) and Path(value).expanduser().exists()
    }
    overrides = type(adapter).processor_overrides(adapter.config, replace(options, **here))
    looks = getattr(adapter.observer, "config", None)
    keep_task = looks is not None and "task" in (looks.inputs or ())
    named = {PREPROCESSOR: overrides, POSTPROCESSOR: {}}
    with processor_files(adapter, Path(base_folder)) as source:
        _write_changed(folder, source, named, adapter.renames(), keep_task)


def _write_changed(
    folder: Path, source: Path, overrides: dict[str, dict[str, Any]], renames: dict[str, str], keep_task: bool
) -> None:
    """The processors in ``source``, with these overrides and with a first step of the artefact's own.

    That step renames and keeps the instructions, where either is asked for.
    """
    for name, changes in overrides.items():
        content = json.loads((source / name).read_text(encoding="utf-8"))
        steps = content["steps"]
        for step in steps:
            own = step.get("registry_name")
            step.setdefault("config", {}).update(changes.get(own, {}))
            if own == RENAME_STEP:
                step["config"]["rename_map"] = {}
        if name == PREPROCESSOR and (renames or keep_task):
            settings = {"rename_map": renames, "keep_task": keep_task}
            steps.insert(0, {"registry_name": OWN_RENAME_STEP, "config": settings})
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in state_files(source):
        shutil.copyfile(source / name, folder / name)


def check_processors(folder: Path) -> None:
    """Refuse an artefact's folder without the processors.

    Raises:
        UserError: one is missing.
    """
    missing = [name for name in (PREPROCESSOR, POSTPROCESSOR) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            "--policy.path",
            f"{folder} lacks {', '.join(missing)}, which LeRobot's commands need; write it anew with "
            f"`trimtab export --run={folder} --output_dir=...`",
        )
