"""The config of a saved policy: decoded by LeRobot, checked, and set to act instead of to train."""

import json
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from lerobot.utils.constants import ACTION

from trimtab.adapters.checkpoint.files import CONFIG, POSTPROCESSOR, PREPROCESSOR, processor_steps, read_json
from trimtab.adapters.errors import UserError, policy_error, reason

# Fields that count something of which there is at least one, whatever the policy calls it.
COUNTS = (
    *("n_obs_steps", "n_action_steps", "chunk_size", "horizon", "action_horizon"),
    *("num_steps", "num_inference_steps", "num_inference_timesteps", "num_train_timesteps"),
    *("num_denoise_steps", "num_denoising_steps", "num_integration_steps", "action_num_inference_steps"),
)
CHANNELS = (1, 3, 4)
SIDES = ("input_features", "output_features")


def read_policy_type(folder: Path) -> str:
    """The ``type`` in a policy folder's config.json."""
    raw = read_json(folder / CONFIG)
    policy_type = raw.get("type")
    if isinstance(policy_type, str):
        return policy_type
    keys = ", ".join(list(raw)[:8]) or "nothing"
    whose = "it is not the config of a LeRobot policy"
    if isinstance(raw.get("model_type"), str):
        whose = f"it is the config of another library's '{raw['model_type']}' model"
    elif "input_shapes" in raw:
        whose = "LeRobot wrote such configs before 2025, and reads them no more"
    raise policy_error(f"{folder / CONFIG} has no 'type' (it holds {keys}): {whose}")


def read_config(folder: Path) -> Any:
    """The LeRobot config of the policy in ``folder``, checked for what LeRobot itself lets pass."""
    import lerobot.policies  # registers LeRobot's own types
    from lerobot.configs import PreTrainedConfig

    path = folder / CONFIG
    raw = read_json(path)
    try:
        _refuse(path, _odd_in_file(raw, folder, PreTrainedConfig.get_known_choices().get(raw["type"])))
        config: Any = PreTrainedConfig.from_pretrained(str(folder))
        _refuse(path, _odd_when_read(config))
    except UserError:
        raise
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
    if hasattr(
        config, "pretrained_backbone_weights"
    ):  # would be downloaded, and replaced by the checkpoint's
        config.pretrained_backbone_weights = None
    if getattr(config, "rtc_config", None) is not None:
        if config.rtc_config.enabled:
            notes.append("real-time chunking is off: with it a chunk depends on the one before")
        config.rtc_config = None
    if getattr(config, "compile_model", False):
        config.compile_model = False
        notes.append("compile_model is off here: the same actions, without waiting for the compiler")
    return notes


def _refuse(path: Path, faults: Iterator[str]) -> None:
    for fault in faults:
        raise policy_error(f"{path} cannot be loaded: {fault}")


def _odd_in_file(raw: dict[str, Any], folder: Path, cls: type | None) -> Iterator[str]:
    """Empty features, though a class may put in its own (fastwam does); nulls, which draccus always takes."""
    for side in SIDES:
        if not raw.get(side):
            yield (
                f"its {side} are empty; LeRobot fills them from the dataset in training, and a policy "
                f"cannot run without: fill them in{_known(folder, side)}"
            )
    if cls is None:
        return  # LeRobot will say so
    hints = get_type_hints(cls)
    for field in fields(cls):
        hint = hints.get(field.name, Any)
        free = hint is Any or NoneType in get_args(hint) or field.default is None
        if field.name in raw and raw[field.name] is None and not free:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            usual = "" if default is MISSING else f" (LeRobot's default is {default})"
            yield f"{field.name} is null; it needs a value{usual}"


def _odd_when_read(config: Any) -> Iterator[str]:
    """Counts below one, and features without a sensible shape."""
    for name in COUNTS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value < 1:
            yield f"{name} is {value}; it must be at least 1"
    for side in SIDES:
        for key, feature in getattr(config, side).items():
            name, kind, shape = f"{side}.{key}", feature.type, feature.shape
            if kind is None or not shape or any(not isinstance(n, int) or n < 1 for n in shape):
                yield f"{name} has type {kind} and shape {shape}; both must say what it is"
            elif kind.value == "VISUAL" and len(shape) != 3:
                yield f"{name} has shape {list(shape)}; an image is (channels, height, width)"
            elif kind.value == "VISUAL" and shape[0] not in CHANNELS and shape[2] in CHANNELS:
                yield (
                    f"{name} has shape {list(shape)}; LeRobot's images are (channels, height, width): "
                    f"{[shape[2], *shape[:2]]}"
                )
    if config.action_feature is None:
        keys = ", ".join(f"{key} ({feature.type.value})" for key, feature in config.output_features.items())
        yield f"its output_features hold {keys}, but no '{ACTION}' of type ACTION"


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
