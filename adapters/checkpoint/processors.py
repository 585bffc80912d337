"""The processors of a policy: loaded by LeRobot, and checked to normalise what was normalised in training.

Checkpoints of LeRobot before 0.4 hold the statistics among the weights and no processors: their policies
normalised in buffers of their own (``normalize_inputs.buffer_observation_state.mean``). From those LeRobot's
own factory makes the processors that it would save today. Nothing is written into the folder.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from trimtab.adapters.checkpoint.files import (
    OLD_STATISTICS,
    OPTION,
    POSTPROCESSOR,
    PREPROCESSOR,
    processor_steps,
)
from trimtab.adapters.config import PolicyConfig
from trimtab.adapters.errors import UserError, policy_error, reason

# The statistics that LeRobot's normalisers compute with; without them they pass values through as they are.
STATISTICS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
TOKENIZER_STEP = "tokenizer_processor"
RENAME_STEP = "rename_observations_processor"
DEVICE_STEP = "device_processor"
# Entries of a processor step that name something to be fetched.
FETCHED = {"tokenizer_name", "processor_name", "model_name", "checkpoint_path"}
FAILED_STEP = re.compile(r"Failed to instantiate processor step '([^']+)'")
# SmolVLA's had one set for each dataset that it was trained on (`normalize_inputs.so100-red_buffer_...`).
BUFFER = re.compile(r"\w+\.(?:so\d+(?:-\w+?)?[_.])?buffer_(?P<feature>.+)\.(?P<statistic>mean|std|min|max)")
# Made the actions; `normalize_targets`, of the loss, counts where it stands alone.
EXECUTED = "unnormalize_outputs"


def is_legacy(folder: Path) -> bool:
    """Whether a policy's folder (that ``resolve_folder`` let pass) has no processors of its own."""
    return not (folder / PREPROCESSOR).is_file() and not (folder / POSTPROCESSOR).is_file()


def take_statistics(saved: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take what is no tensor of the model but a statistic out of ``saved``, and return it."""
    names = [name for name in saved if name.startswith(OLD_STATISTICS) and name not in state]
    return {name: saved.pop(name) for name in names}


def statistics(old: dict[str, Tensor], config: Any, path: Path) -> dict[str, dict[str, Tensor]]:
    """Statistics by feature, as LeRobot's datasets have them, from what ``take_statistics`` returned.

    The buffers' names have underscores where the features have dots.
    """
    features = [*config.input_features, *config.output_features]
    stats: dict[str, dict[str, Tensor]] = {}
    for name, value in old.items():
        if "_targets." in name and EXECUTED + name[name.index(".") :] in old:
            continue
        match = BUFFER.fullmatch(name)
        whose = [key for key in features if match and key.replace(".", "_") == match["feature"]]
        if match is None or len(whose) != 1:
            raise policy_error(
                f"the statistic '{name}' in {path} belongs to {' and '.join(whose) or 'none'} of the "
                f"features in config.json ({', '.join(features)}); correct their names"
            )
        known, statistic = stats.setdefault(whose[0], {}), match["statistic"]
        if statistic in known and not torch.equal(known[statistic], value):
            raise policy_error(
                f"{path} holds several statistics of '{whose[0]}' that differ (one is '{name}'): the policy "
                "was trained on several datasets; fine-tune it on one"
            )
        known[statistic] = value
    return stats


def _factory(config: Any, tokenizer: dict[str, Any] | None) -> Callable[..., tuple[Any, Any]]:
    """LeRobot's factory; with another tokenizer, its code with that bound anew, for it knows no option."""
    from lerobot.policies.factory import make_pre_post_processors

    if not tokenizer:
        return make_pre_post_processors
    module = import_module(type(config).__module__.replace("configuration_", "processor_"))
    plain, step = getattr(module, f"make_{config.type}_pre_post_processors"), module.TokenizerProcessorStep

    def local(**arguments: Any) -> Any:
        return step(**{**arguments, **tokenizer})

    names = vars(module) | {"TokenizerProcessorStep": local}
    return FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__)


@contextmanager
def processor_files(adapter: Any, folder: Path) -> Iterator[Path]:
    """A folder with the processors' files of a base: its own, or a temporary one with what was made."""
    if not is_legacy(folder):
        yield folder
        return
    with TemporaryDirectory() as made:
        for pipeline in (adapter.preprocessor, adapter.postprocessor):
            pipeline.save_pretrained(made)
        yield Path(made)


def load_processors(
    config: Any,
    folder: Path,
    overrides: dict[str, dict[str, Any]],
    stats: dict[str, dict[str, Tensor]] | None,
) -> tuple[Any, Any]:
    """The (pre-, post-) processor, as LeRobot loads it, or makes it of an old checkpoint's ``stats``.

    ``overrides`` are for steps of the preprocessor, by name.
    """
    from lerobot.policies.factory import make_pre_post_processors

    if stats is not None:
        pre, post = _factory(config, overrides.get(TOKENIZER_STEP))(config, dataset_stats=stats)
        for index, step in enumerate(pre.steps):
            changes = overrides.get(getattr(type(step), "_registry_name", ""))
            if changes:
                pre.steps[index] = type(step)(**{**step.get_config(), **changes})
        return pre, post
    return make_pre_post_processors(
        config,
        pretrained_path=str(folder),
        preprocessor_overrides={DEVICE_STEP: {"device": config.device}, **overrides},
        postprocessor_overrides={},
    )


def processor_error(
    error: Exception, folder: Path, options: PolicyConfig, taken: Collection[str]
) -> UserError:
    """What to tell the user where LeRobot cannot build the processors.

    ``taken`` says which of ``tokenizer`` and ``backbone`` have an effect on this policy.
    """
    from lerobot.processor import ProcessorStepRegistry

    intro = f"the processors in {folder} cannot be loaded"
    try:
        before, after = (processor_steps(folder / name) for name in (PREPROCESSOR, POSTPROCESSOR))
    except UserError as broken:
        return policy_error(f"{intro}: {broken.message}")
    known = ProcessorStepRegistry.list()
    for file, steps in ((PREPROCESSOR, before), (POSTPROCESSOR, after)):
        unknown = [name for name, step in steps if step.get("registry_name") and name not in known]
        if unknown:
            return policy_error(
                f"{folder / file} has a step '{unknown[0]}', which LeRobot does not know; the code that it "
                "was trained with registers it: name that package with --policy.discover_packages_path="
            )
    failed = FAILED_STEP.search(str(error))
    why = reason(error)
    if failed is not None:
        why = f"step '{failed[1]}': {reason(error.__cause__ or error)}"
    elif isinstance(error, KeyError) and before and DEVICE_STEP not in dict(before):
        why = (
            f"{folder / PREPROCESSOR} has no step '{DEVICE_STEP}' (it has {', '.join(dict(before))}), and "
            "LeRobot's own commands do not run without"
        )
    settings = {name: step.get("config") or {} for name, step in (*before, *after)}
    fetches = not FETCHED.isdisjoint(settings.get(failed[1], {})) if failed else is_legacy(folder)
    option, hint = OPTION, ""
    # A TypeError is about an option that the step does not have.
    if fetches and not isinstance(error.__cause__, TypeError):
        given = [name for name in ("tokenizer", "backbone") if getattr(options, name)]
        hints = [f"--policy.{name}=FOLDER" for name in ("tokenizer", "backbone") if name in taken]
        if given:
            option = f"--policy.{given[0]}"
        elif hints:
            hint = f"; name what cannot be fetched: {' or '.join(hints)}"
    return UserError(option, f"{intro}: {why}{hint}")


def check_processors(pre: Any, post: Any, config: Any, folder: Path, weights: Path) -> list[str]:
    """Refuse processors that do not normalise what the policy was trained to see and to say.

    LeRobot's pass on unchanged what they have no statistics of: raw normalised actions would be executed.
    Returns a line for the user where config.json says otherwise than the processors.
    """
    modes = getattr(config, "normalization_mapping", None) or {}
    modes = {kind: mode.value for kind, mode in modes.items() if mode}
    notes = []
    sides = (
        (pre, config.input_features, PREPROCESSOR, "normalises"),
        (post, config.output_features, POSTPROCESSOR, "un-normalises"),
    )
    for pipeline, features, name, does in sides:
        path = weights if is_legacy(folder) else folder / name
        kinds = [feature.type.value for feature in features.values()]
        wanted = {kind: modes[kind] for kind in kinds if modes.get(kind, "IDENTITY") != "IDENTITY"}
        # Of LeRobot's common steps it is known which normalise; any other may.
        own = [s for s in pipeline.steps if not type(s).__module__.startswith("lerobot.processor")]
        if wanted and not own and not any(getattr(step, "norm_map", None) for step in pipeline.steps):
            kind, mode = next(iter(wanted.items()))
            raise policy_error(
                f"by config.json, {kind} was normalised by {mode} in training, but no step of {path} {does} "
                f"it (it has {', '.join(map(_name, pipeline.steps)) or 'none'}); put the step back, or set "
                f"normalization_mapping.{kind} to IDENTITY if it was trained without"
            )
        for step in pipeline.steps:
            stats = getattr(step, "_tensor_stats", None) or getattr(step, "stats", None) or {}
            for key, feature in features.items():
                mode = _normalisation(step, key, feature)
                _check_statistics(stats, key, mode, _name(step), path)
                declared = modes.get(feature.type.value, "IDENTITY")
                if mode and getattr(step, "norm_map", None) and mode != declared:
                    notes.append(
                        f"{path.name} {does} '{key}' by {mode}, where config.json says {declared} "
                        f"(normalization_mapping.{feature.type.value}): the former counts, as for LeRobot"
                    )
    return notes


def _name(step: Any) -> str:
    return getattr(type(step), "_registry_name", None) or type(step).__name__


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


def _check_statistics(stats: dict[str, Any], key: str, mode: str | None, step: str, path: Path) -> None:
    """Refuse a step named ``step`` that has not the statistics with which it is to normalise ``key``."""
    known = {name: torch.as_tensor(value) for name, value in stats.get(key, {}).items()}
    bad = [
        name
        for name in STATISTICS.get(mode or "", ())
        if name not in known or not known[name].numel() or not torch.isfinite(known[name]).all()
    ]
    if not bad:
        return
    saved = dict(processor_steps(path)).get(step, {}) if path.suffix == ".json" else {}
    beside = sorted(file.name for file in path.parent.glob(f"{path.stem}_step_*.safetensors"))
    alike = [name for name in stats if name.replace(".", "_") == key.replace(".", "_")]
    if known and all(name in known for name in bad):
        there = "it was never filled: a base model gets its statistics when it is fine-tuned"
    elif known:
        there = f"there is its {', '.join(sorted(known))}"
    elif not stats and "state_file" not in saved and beside:
        there = f"its step '{step}' names no state_file; {', '.join(beside)} lies beside it"
    elif not stats:
        there = "it has no statistics at all: a base model gets them when it is fine-tuned"
    elif alike:
        there = (
            f"there are statistics of {', '.join(stats)}; '{alike[0]}' looks like it, as LeRobot's migration "
            f"tool writes names with an underscore: rename it in {saved.get('state_file', path.name)}, or "
            "name the checkpoint as it was before, which loads as it is"
        )
    else:
        there = f"there are statistics of {', '.join(stats)}; correct the names"
    raise policy_error(
        f"{path} normalises '{key}' by {mode} but has no finite {' and '.join(bad)} of it; {there}"
    )
