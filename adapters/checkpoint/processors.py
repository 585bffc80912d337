"""The processors of a policy: loaded by LeRobot, and checked to normalise what was normalised in training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.adapters.checkpoint.files import (
    OPTION,
    POSTPROCESSOR,
    PREPROCESSOR,
    raw_steps,
    read_processor_steps,
    step_name,
)
from trimtab.adapters.checkpoint.legacy import is_legacy, make_processors, read_statistics
from trimtab.adapters.config import PolicyConfig
from trimtab.adapters.errors import UserError, reason

# The statistics that LeRobot's normalisers compute with; without them they pass values through as they are.
STATISTICS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
RENAME_STEP = "rename_observations_processor"
DEVICE_STEP = "device_processor"
# Entries of a processor step that name something to be fetched.
FETCHED = {"tokenizer_name", "processor_name", "model_name", "checkpoint_path"}
FAILED_STEP = re.compile(r"Failed to instantiate processor step '([^']+)'")


def load_processors(
    config: Any,
    folder: Path,
    before: dict[str, dict[str, Any]] | None = None,
    after: dict[str, dict[str, Any]] | None = None,
    stats: dict[str, dict[str, Tensor]] | None = None,
) -> tuple[Any, Any]:
    """The policy's (pre-, post-) processor, as LeRobot loads it, or makes it of an old checkpoint.

    Args:
        config: the policy's; it names the device.
        folder: the policy's.
        before: overrides for steps of the preprocessor, by name.
        after: the same of the postprocessor.
        stats: what an old checkpoint's weights say; default: read from them.
    """
    from lerobot.policies.factory import make_pre_post_processors

    if is_legacy(folder):
        stats = stats if stats is not None else read_statistics(config, folder)
        return make_processors(config, stats, before or {})
    return make_pre_post_processors(
        config,
        pretrained_path=str(folder),
        preprocessor_overrides={DEVICE_STEP: {"device": config.device}, **(before or {})},
        postprocessor_overrides=after or {},
    )


def renaming(folder: Path, options: PolicyConfig) -> dict[str, dict[str, Any]]:
    """The override that renames observations as the user says.

    Raises:
        UserError: the saved preprocessor has no step for it.
    """
    if not options.rename_map:
        return {}
    if not is_legacy(folder) and RENAME_STEP not in read_processor_steps(folder / PREPROCESSOR):
        raise UserError(
            "--policy.rename_map", f"{folder / PREPROCESSOR} has no step that renames observations"
        )
    return {RENAME_STEP: {"rename_map": options.rename_map}}


def processor_error(error: Exception, folder: Path, options: PolicyConfig, asked: set[str]) -> UserError:
    """What to tell the user where LeRobot cannot build the processors.

    Args:
        error: LeRobot's.
        folder: the policy's.
        options: the user's.
        asked: which of ``tokenizer`` and ``backbone`` the adapter has a use for.
    """
    files = [folder / name for name in (PREPROCESSOR, POSTPROCESSOR) if (folder / name).is_file()]
    try:
        steps = {step_name(step): step.get("config") or {} for file in files for step in raw_steps(file)}
    except UserError as broken:
        return UserError(OPTION, f"the processors in {folder} cannot be loaded: {broken.message}")
    unknown = [_unknown_step(file) for file in files if _unknown_step(file)]
    if unknown:
        return UserError(OPTION, unknown[0])
    failed = FAILED_STEP.search(str(error))
    why = reason(error)
    if failed is not None:
        why = f"step '{failed[1]}': {reason(error.__cause__ or error)}"
    elif isinstance(error, KeyError) and DEVICE_STEP not in (own := _own_steps(folder)) and own:
        why = (
            f"{folder / PREPROCESSOR} has no step '{DEVICE_STEP}' (it has {', '.join(own) or 'none'}), and "
            "LeRobot's own commands do not run without"
        )
    message = f"the processors in {folder} cannot be loaded: {why}"
    if isinstance(error.__cause__, TypeError):  # an option that the step does not have
        return UserError(OPTION, message)
    fetches = not FETCHED.isdisjoint(steps.get(failed[1], {})) if failed else is_legacy(folder)
    if not fetches:
        return UserError(OPTION, message)
    for name in ("tokenizer", "backbone"):
        if getattr(options, name):
            return UserError(f"--policy.{name}", message)
    hints = [f"--policy.{name}=FOLDER" for name in ("tokenizer", "backbone") if name in asked]
    return UserError(
        OPTION, f"{message}; name what cannot be fetched: {' or '.join(hints)}" if hints else message
    )


def _own_steps(folder: Path) -> list[str]:
    path = folder / PREPROCESSOR
    return [step_name(step) for step in raw_steps(path)] if path.is_file() else []


def _unknown_step(path: Path) -> str | None:
    """What to say of a step that nobody has registered; ``None`` where all are known."""
    from lerobot.processor import ProcessorStepRegistry

    known = ProcessorStepRegistry.list()
    for step in raw_steps(path):
        name = step.get("registry_name")
        if name is not None and name not in known:
            return (
                f"{path} has a step '{name}', which LeRobot does not know; the code that it was trained with "
                "registers it: name that package with --policy.discover_packages_path="
            )
    return None


def check_processors(pre: Any, post: Any, config: Any, folder: Path, weights: Path) -> None:
    """Refuse processors that do not normalise what the policy was trained to see and to say.

    LeRobot's pass on unchanged what they have no statistics of: raw normalised actions would be executed.

    Args:
        pre: the policy's preprocessor.
        post: its postprocessor.
        config: the policy's.
        folder: the policy's, for the messages.
        weights: where an old checkpoint has its statistics.

    Raises:
        UserError: a (un)normaliser is missing; statistics are missing, or hold NaN or Inf.
    """
    sides = (
        (pre, config.input_features, PREPROCESSOR, "normalises"),
        (post, config.output_features, POSTPROCESSOR, "un-normalises"),
    )
    for pipeline, features, name, does in sides:
        path = weights if is_legacy(folder) else folder / name
        modes = getattr(config, "normalization_mapping", None) or {}
        wanted = {f.type.value: modes.get(f.type.value) for f in features.values()}
        wanted = {kind: mode.value for kind, mode in wanted.items() if mode and mode.value != "IDENTITY"}
        if wanted and not any(_may_normalise(step) for step in pipeline.steps):
            kind, mode = next(iter(wanted.items()))
            raise UserError(
                OPTION,
                f"by config.json, {kind} was normalised by {mode} in training, but no step of {path} {does} "
                f"it (it has {', '.join(map(_name, pipeline.steps)) or 'none'}); put the step back, or set "
                f"normalization_mapping.{kind} to IDENTITY if it was trained without",
            )
        for step in pipeline.steps:
            _check_statistics(step, features, path)


def _name(step: Any) -> str:
    return getattr(type(step), "_registry_name", None) or type(step).__name__


def _may_normalise(step: Any) -> bool:
    """Whether a step has statistics, or is not one of LeRobot's common ones, of which that is known."""
    common = type(step).__module__.startswith("lerobot.processor")
    return not common or bool(getattr(step, "norm_map", None))


def _check_statistics(step: Any, features: dict[str, Any], path: Path) -> None:
    stats = getattr(step, "_tensor_stats", None) or getattr(step, "stats", None) or {}
    for key, feature in features.items():
        mode = _normalisation(step, key, feature)
        known = {name: torch.as_tensor(value) for name, value in stats.get(key, {}).items()}
        bad = [
            name
            for name in STATISTICS.get(mode, ())
            if name not in known or not known[name].numel() or not torch.isfinite(known[name]).all()
        ]
        if bad:
            raise UserError(
                OPTION,
                f"{path} normalises '{key}' by {mode} but has no finite {' and '.join(bad)} of it; "
                f"{_there(step, key, bad, known, stats, path)}",
            )


def _there(
    step: Any, key: str, bad: list[str], known: dict[str, Tensor], stats: dict[str, Any], path: Path
) -> str:
    """What statistics there are instead, and the mend."""
    if known and all(name in known for name in bad):
        return "it was never filled: a base model gets its statistics when it is fine-tuned"
    if known:
        return f"there is its {', '.join(sorted(known))}"
    if not stats:
        saved = next((s for s in raw_steps(path) if step_name(s) == _name(step)), {}) if _json(path) else {}
        beside = sorted(file.name for file in path.parent.glob(f"{path.stem}_step_*.safetensors"))
        if "state_file" not in saved and beside:
            return f"its step '{_name(step)}' names no state_file; {', '.join(beside)} lies beside it"
        return "it has no statistics at all: a base model gets them when it is fine-tuned"
    alike = [name for name in stats if name.replace(".", "_") == key.replace(".", "_")]
    mend = (
        f"'{alike[0]}' looks like it, as LeRobot's migration tool writes names with an underscore: rename it "
        f"in {_state_file(step, path)}, or name the checkpoint as it was before, which loads as it is"
        if alike
        else "correct the names"
    )
    return f"there are statistics of {', '.join(stats)}; {mend}"


def _json(path: Path) -> bool:
    return path.suffix == ".json"


def _state_file(step: Any, path: Path) -> str:
    saved = next((s for s in raw_steps(path) if step_name(s) == _name(step)), {}) if _json(path) else {}
    return str(saved.get("state_file", path.name))


def _normalisation(step: Any, key: str, feature: Any) -> str | None:
    """How a processor's step is to (un)normalise a feature; ``None`` = not at all."""
    kind = feature.type.value
    if getattr(step, "normalize_min_max", False) and kind in ("STATE", "ACTION"):  # GR00T's own
        return "MIN_MAX"
    modes = getattr(step, "norm_map", None)
    if not modes or "empty_camera" in key:
        return None
    chosen = step.normalize_observation_keys
    if kind != "ACTION" and (key not in step.features or (chosen is not None and key not in chosen)):
        return None  # left as it is, in training too
    mode = modes.get(feature.type)
    return mode.value if mode else None
