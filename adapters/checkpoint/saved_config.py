"""The config of a saved policy: decoded by LeRobot, checked, and set to act instead of to train."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from trimtab.adapters.checkpoint.files import CONFIG, POSTPROCESSOR, PREPROCESSOR, processor_steps, read_json
from trimtab.adapters.errors import policy_error, reason

# Fields that count something of which there is at least one, whatever the policy calls it.
COUNTS = (
    *("n_obs_steps", "n_action_steps", "chunk_size", "horizon", "action_horizon"),
    *("num_steps", "num_inference_steps", "num_inference_timesteps", "num_train_timesteps"),
    *("num_denoise_steps", "num_denoising_steps", "num_integration_steps", "action_num_inference_steps"),
)
CHANNELS = (1, 3, 4)
SIDES = ("input_features", "output_features")


class _Senseless(ValueError):
    """What this module finds wrong with a config."""


def read_config(folder: Path) -> Any:
    """The LeRobot config of the policy in ``folder``.

    Raises:
        UserError: LeRobot refuses it; a field that needs a value is null; features are missing or senseless.
    """
    import lerobot.policies  # registers LeRobot's own types
    from lerobot.configs import PreTrainedConfig

    path = folder / CONFIG
    raw = read_json(path)
    try:
        _refuse_empty_features(raw, folder)
        if cls := PreTrainedConfig.get_known_choices().get(raw["type"]):  # else LeRobot says so below
            _refuse_nulls(raw, cls)
        config: Any = PreTrainedConfig.from_pretrained(str(folder))
        _check(config)
    except _Senseless as error:
        raise policy_error(f"{path} cannot be loaded: {error}") from None
    except Exception as error:
        hint = ""
        if "are not valid for" in str(error):
            hint = (
                f"; LeRobot {lerobot.__version__} has no such fields: another version wrote them, or a hand"
            )
        raise policy_error(f"{path} cannot be loaded: {reason(error)}{hint}") from error
    # The instruction travels beside the observations, whatever a config says.
    config.input_features = {k: f for k, f in config.input_features.items() if f.type.value != "LANGUAGE"}
    return config


def set_to_act(config: Any) -> list[str]:
    """Switch off what serves training or another way to run; return a line for each change.

    What is without effect in eval mode (gradient checkpointing, what is frozen) stays, for fine-tuning.
    """
    notes = []
    if getattr(config, "rtc_config", None) is not None:
        if config.rtc_config.enabled:
            notes.append("real-time chunking is off: with it a chunk depends on the one before")
        config.rtc_config = None
    if getattr(config, "compile_model", False):
        config.compile_model = False
        notes.append("compile_model is off here: the same actions, without waiting for the compiler")
    return notes


def _refuse_empty_features(raw: dict[str, Any], folder: Path) -> None:
    """In the file: a class may put in features of its own (fastwam does)."""
    for side in SIDES:
        if not raw.get(side):
            raise _Senseless(
                f"its {side} are empty; LeRobot fills them from the dataset in training, and a policy "
                f"cannot run without: fill them in{_known(folder, side)}"
            )


def _refuse_nulls(raw: dict[str, Any], cls: type) -> None:
    """draccus takes null for any plain type."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        hint = hints.get(field.name, Any)
        free = hint is Any or NoneType in get_args(hint) or field.default is None
        if field.name in raw and raw[field.name] is None and not free:
            default = field.default
            if field.default_factory is not MISSING:
                default = field.default_factory()
            usual = "" if default is MISSING else f" (LeRobot's default is {default})"
            raise _Senseless(f"{field.name} is null; it needs a value{usual}")


def _check(config: Any) -> None:
    from lerobot.utils.constants import ACTION

    for name in COUNTS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value < 1:
            raise _Senseless(f"{name} is {value}; it must be at least 1")
    for side in SIDES:
        for key, feature in getattr(config, side).items():
            _check_feature(f"{side}.{key}", feature)
    if config.action_feature is None:
        keys = ", ".join(f"{key} ({feature.type.value})" for key, feature in config.output_features.items())
        raise _Senseless(f"its output_features hold {keys}, but no '{ACTION}' of type ACTION")


def _check_feature(name: str, feature: Any) -> None:
    shape = feature.shape
    if feature.type is None or not shape or any(not isinstance(n, int) or n < 1 for n in shape):
        raise _Senseless(f"{name} has type {feature.type} and shape {shape}; both must say what it is")
    if feature.type.value != "VISUAL":
        return
    if len(shape) != 3:
        raise _Senseless(f"{name} has shape {list(shape)}; an image is (channels, height, width)")
    if shape[0] not in CHANNELS and shape[2] in CHANNELS:
        turned = [shape[2], *shape[:2]]
        raise _Senseless(
            f"{name} has shape {list(shape)}; LeRobot's images are (channels, height, width): {turned}"
        )


def _known(folder: Path, side: str) -> str:
    """What the saved (un)normaliser says of the features, as it is to be written."""
    known: dict[str, Any] = {}
    for file in (PREPROCESSOR, POSTPROCESSOR):
        for _, step in processor_steps(folder / file):
            features = (step.get("config") or {}).get("features")
            known |= features if isinstance(features, dict) else {}
    outputs = side == "output_features"
    fitting = {
        key: feature
        for key, feature in known.items()
        if isinstance(feature, dict) and (feature.get("type") == "ACTION") == outputs
    }
    return f", by its saved processors {json.dumps(fitting)}" if fitting else ""
