"""Processors of a steered policy: those of its base, copied with what the base was loaded with.

LeRobot's commands run them around the policy, so that normalisation is the base's own; the policy works on
normalised batches and returns normalised actions.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    EnvTransition,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
    RenameObservationsProcessorStep,
    TransitionKey,
)

from trimtab.adapters import PolicyAdapter, PolicyConfig
from trimtab.adapters.checkpoint.files import POSTPROCESSOR, PREPROCESSOR, state_files
from trimtab.adapters.checkpoint.folder import is_server
from trimtab.adapters.checkpoint.processors import RENAME_STEP, processor_files

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


def write_processors(
    folder: Path, adapter: PolicyAdapter, options: PolicyConfig, base_folder: Path | str
) -> None:
    """Write into ``folder`` the processors that LeRobot is to run around the steered base.

    Those of the base, with a first step of the artefact's own where renaming or the instructions ask for it;
    a tokenizer or backbone that ``options`` name is written in. For a policy server, which normalises by
    itself, processors that do nothing.
    """
    if is_server(str(base_folder)):
        _write_plain(folder, adapter.device.type)
        return
    here: dict[str, Any] = {  # LeRobot's commands may run in another folder
        name: str(Path(value).expanduser().resolve())
        for name in ("tokenizer", "backbone")
        if (value := getattr(options, name)) and Path(value).expanduser().exists()
    }
    overrides = type(adapter).processor_overrides(adapter.config, replace(options, **here))
    looks = getattr(adapter.observer, "config", None)
    settings = {
        "rename_map": adapter.renames(),
        "keep_task": looks is not None and "task" in (looks.inputs or ()),
    }
    with processor_files(adapter, Path(base_folder)) as source:
        for name, changes in ((PREPROCESSOR, overrides), (POSTPROCESSOR, {})):
            content = json.loads((source / name).read_text(encoding="utf-8"))
            steps = content["steps"]
            for step in steps:
                own = step.get("registry_name")
                step.setdefault("config", {}).update(changes.get(own, {}))
                if own == RENAME_STEP:
                    step["config"]["rename_map"] = {}
            if name == PREPROCESSOR and any(settings.values()):
                steps.insert(0, {"registry_name": OWN_RENAME_STEP, "config": settings})
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name in state_files(source):
            shutil.copyfile(source / name, folder / name)


def _write_plain(folder: Path, device: str) -> None:
    """Processors that normalise nothing."""
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=device),
    ]
    after = DeviceProcessorStep(device="cpu")
    for steps, name in ((before, PREPROCESSOR), ([after], POSTPROCESSOR)):
        PolicyProcessorPipeline(steps=steps, name=Path(name).stem).save_pretrained(folder)
