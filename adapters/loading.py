"""Load a LeRobot policy folder into an adapter, and prove that what was loaded is what was saved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.adapters.base import PolicyAdapter, adapter_class, adapter_types
from trimtab.adapters.config import DTYPES, PolicyConfig
from trimtab.adapters.errors import UserError, reason
from trimtab.adapters.files import (
    OPTION,
    PEFT_WEIGHTS,
    POSTPROCESSOR,
    PREPROCESSOR,
    WEIGHTS,
    is_peft,
    is_server,
    part_weights,
    peft_base,
    read_policy_type,
    read_processor_steps,
    read_weights,
    resolve_folder,
)

# Policies whose sampling has no continuous noise to steer.
NO_NOISE = {
    "pi0_fast": "it writes action tokens one after another and draws no noise",
    "vqbet": "it draws categorical codes, not continuous noise",
    "tdmpc": "it plans with a learnt model instead of denoising",
    "gaussian_actor": "it is itself an RL actor",
}
# Statistics that LeRobot kept among the weights before it saved processors.
OLD_STATISTICS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.", "unnormalize_targets.")
# The statistics that LeRobot's normalisers compute with; without them they pass values through as they are.
STATISTICS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
BACKBONE = "--policy.backbone"
RENAME_STEP = "rename_observations_processor"
# Entries of a processor step that name something to be fetched.
FETCHED = {"tokenizer_name", "processor_name", "model_name", "checkpoint_path"}
FAILED_STEP = re.compile(r"Failed to instantiate processor step '([^']+)'")


def load_adapter(config: PolicyConfig, token: str | None = None) -> PolicyAdapter:
    """Load, check, freeze and wrap the policy that ``config`` names.

    Args:
        config: the policy and how to load it.
        token: Hub token for private repositories; default: the Hub's own (``HF_TOKEN``).

    Raises:
        UserError: the folder is missing, half-written or broken; the type cannot be steered; the policy
            samples at random or ignores its noise; no policy server answers.
    """
    adapter = open_adapter(config, token)
    try:
        adapter.verify()
    except BaseException as error:
        adapter.close()
        if not isinstance(error, (RuntimeError, ValueError, TypeError)):
            raise
        hint = f"; try another --policy.dtype than {config.dtype}" if config.dtype else ""
        raise UserError(OPTION, f"{config.path} loads but does not run: {reason(error)}{hint}") from error
    return adapter


def open_adapter(config: PolicyConfig, token: str | None = None) -> PolicyAdapter:
    """``load_adapter`` without the final ``verify``, for whoever reports what it would find.

    Raises:
        UserError: as ``load_adapter``, less what ``verify`` raises.
    """
    if not config.path:
        raise UserError(OPTION, "name the folder or Hub repository of the base policy")
    if config.num_inference_steps is not None and config.num_inference_steps < 1:
        raise UserError(
            "--policy.num_inference_steps", f"must be at least 1, got {config.num_inference_steps}"
        )
    if config.dtype is not None and config.dtype not in DTYPES:
        raise UserError("--policy.dtype", f"must be one of {', '.join(DTYPES)}, got {config.dtype}")
    if is_server(config.path):
        from trimtab.adapters.remote import RemoteAdapter

        return RemoteAdapter(config, usable_device(config.device))
    folder = resolve_folder(config.path, config.revision, token)
    policy_type = read_policy_type(folder)
    cls = adapter_class(policy_type)
    if cls is None:
        raise UserError(OPTION, _no_adapter(policy_type))
    return _build(cls, folder, config, token)


def best_device() -> str:
    """The accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(name: str | None) -> str:
    """The device ``name``, or the best there is.

    Raises:
        UserError: it cannot be used here.
    """
    device = name or best_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError("--policy.device", f"'{device}' is not usable here ({error})") from None
    return device


def _no_adapter(policy_type: str) -> str:
    if policy_type in NO_NOISE:
        return f"a policy of type '{policy_type}' cannot be steered: {NO_NOISE[policy_type]}"
    return (
        f"no adapter for policies of type '{policy_type}' yet; there is one for {', '.join(adapter_types())} "
        "(write your own: adapters/README.md)"
    )


class _Watched(PolicyConfig):
    """The user's options, and which of them the adapter asked for."""

    asked: set[str]

    def __getattribute__(self, name: str) -> Any:
        if name in ("tokenizer", "backbone"):
            object.__getattribute__(self, "__dict__").setdefault("asked", set()).add(name)
        return super().__getattribute__(name)


def _build(cls: type[PolicyAdapter], folder: Path, options: PolicyConfig, token: str | None) -> PolicyAdapter:
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors

    device = usable_device(options.device)
    weights_folder = peft_base(folder, options.base_path, token) if is_peft(folder) else folder
    weights = weights_folder / WEIGHTS
    watched = _Watched(**vars(options))
    watched.asked = set()
    try:
        policy_config = PreTrainedConfig.from_pretrained(str(folder))
        policy_config.device = device
        policy_config.pretrained_path = weights_folder
        if options.dtype and hasattr(policy_config, "dtype"):
            policy_config.dtype = options.dtype
        if options.n_action_steps is not None:
            policy_config.n_action_steps = executed_steps(policy_config, options.n_action_steps)
        notes = list(cls.prepare_config(policy_config, watched))
        before, after = cls.processor_overrides(policy_config, watched)
        before |= _renaming(folder, options)
        _check_options(cls, folder, options, watched.asked, before)
        saved = read_weights(weights, unchecked=OLD_STATISTICS)
        with quietly():
            policy = cls.build(policy_config)
        notes += drop_old_statistics(saved, policy)
        saved = cls.prepare_weights(saved, policy)
    except UserError:
        raise
    except Exception as error:
        raise UserError(OPTION, f"{weights_folder} cannot be loaded: {reason(error)}") from error
    load_weights(policy, saved, weights)
    if is_peft(folder):
        load_peft(policy, folder)
    policy.to(device)
    if options.dtype and not hasattr(policy_config, "dtype"):
        cls.cast(policy, getattr(torch, options.dtype))
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    freeze(policy)
    for name, (part, place) in cls.frozen_parts(policy).items():
        freeze(part)
        check_part(part, place, name)
    try:
        pre, post = make_pre_post_processors(
            policy_config,
            pretrained_path=str(folder),
            preprocessor_overrides={"device_processor": {"device": device}, **before},
            postprocessor_overrides=after,
        )
    except Exception as error:
        raise _processor_error(error, folder, options, watched.asked) from error
    check_statistics(pre, policy_config.input_features, folder / PREPROCESSOR)
    check_statistics(post, policy_config.output_features, folder / POSTPROCESSOR)
    adapter = cls(policy, pre, post)
    if options.n_action_steps not in (None, adapter.chunk_shape[0]):
        raise UserError(
            "--policy.n_action_steps",
            f"this {policy_config.type} policy executes {adapter.chunk_shape[0]} steps of each chunk; "
            "drop the option",
        )
    adapter.notes = [*notes, *adapter.runner_notes()]
    adapter.trainable = trainable
    adapter.weights_files = [folder / PEFT_WEIGHTS, weights] if is_peft(folder) else [weights]
    return adapter


def executed_steps(config: Any, steps: int) -> int:
    """``steps``, if a policy of this config can execute so many of each chunk.

    Raises:
        UserError: it cannot.
    """
    most = getattr(config, "chunk_size", None)
    if most is None and hasattr(config, "horizon"):  # the chunk begins at the first of the observations
        most = config.horizon - config.n_obs_steps + 1
    if most is None or not hasattr(config, "n_action_steps"):
        raise UserError(
            "--policy.n_action_steps", f"has no effect on a {config.type} policy; drop the option"
        )
    if not 1 <= steps <= most:
        raise UserError("--policy.n_action_steps", f"must be between 1 and {most}, got {steps}")
    return steps


def _renaming(folder: Path, options: PolicyConfig) -> dict[str, dict[str, Any]]:
    if not options.rename_map:
        return {}
    if RENAME_STEP not in read_processor_steps(folder / PREPROCESSOR):
        raise UserError(
            "--policy.rename_map", f"{folder / PREPROCESSOR} has no step that renames observations"
        )
    return {RENAME_STEP: {"rename_map": options.rename_map}}


def _check_options(
    cls: type[PolicyAdapter], folder: Path, options: PolicyConfig, asked: set[str], before: dict[str, Any]
) -> None:
    """Refuse a tokenizer or backbone for a policy that has none of its own to be named."""
    taken = asked
    if options.tokenizer and not before.keys() <= read_processor_steps(folder / PREPROCESSOR).keys():
        taken = asked - {"tokenizer"}  # it was meant for a step that the saved preprocessor lacks
    for name in ("tokenizer", "backbone"):
        if getattr(options, name) and name not in taken:
            raise UserError(
                f"--policy.{name}",
                f"a {cls.policy_type} policy has no {name} of its own to be named; drop the option",
            )


def _processor_error(error: Exception, folder: Path, options: PolicyConfig, asked: set[str]) -> UserError:
    """What to tell the user where LeRobot cannot build the saved processors."""
    message = f"the processors in {folder} cannot be loaded: {reason(error.__cause__ or error)}"
    failed = FAILED_STEP.search(str(error))
    if failed is None:
        return UserError(OPTION, message)
    steps: dict[str, Any] = {}
    for file in (PREPROCESSOR, POSTPROCESSOR):
        steps |= read_processor_steps(folder / file)
    if FETCHED.isdisjoint(steps.get(failed[1], {})):
        return UserError(OPTION, message)
    for name in ("tokenizer", "backbone"):
        if getattr(options, name):
            return UserError(f"--policy.{name}", message)
    hints = [f"--policy.{name}=FOLDER" for name in ("tokenizer", "backbone") if name in asked]
    return UserError(
        OPTION, f"{message}; name what cannot be fetched: {' or '.join(hints)}" if hints else message
    )


def check_statistics(pipeline: Any, features: dict[str, Any], path: Path) -> None:
    """Refuse a (un)normaliser without the statistics that it needs.

    LeRobot's passes on unchanged what it has no statistics of: raw normalised actions would be executed.

    Args:
        pipeline: a policy's pre- or postprocessor.
        features: the policy's input or output features.
        path: the processor's file, for the message.

    Raises:
        UserError: statistics are missing, or hold NaN or Inf.
    """
    for step in pipeline.steps:
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
                    "a base model gets its statistics when it is fine-tuned",
                )


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


def drop_old_statistics(saved: dict[str, Tensor], policy: torch.nn.Module) -> list[str]:
    """Take the statistics of older LeRobot versions out of ``saved``; return a note where there were any.

    The processors, which every folder that loads has, took their place.
    """
    state = policy.state_dict()
    old = [name for name in saved if name.startswith(OLD_STATISTICS) and name not in state]
    for name in old:
        del saved[name]
    what = (
        f"{len(old)} statistics of an older LeRobot lie among the weights: left out for the saved processors'"
    )
    return [what] if old else []


def load_weights(policy: torch.nn.Module, saved: dict[str, Tensor], path: Path) -> None:
    """Load ``saved`` and check every tensor of the model against it, bit for bit.

    LeRobot loads with ``strict=False`` by default, and some policies return random weights when the
    file is missing. Shared tensors are saved once; their other names are found by their storage.

    Raises:
        UserError: a tensor is missing, extra, or of another shape.
    """
    state = policy.state_dict()
    extra = sorted(set(saved) - set(state))
    wrong = [n for n in saved if n in state and state[n].shape != saved[n].shape]
    covered = {state[n].data_ptr() for n in saved if n in state}
    missing = sorted(n for n in state if n not in saved and state[n].data_ptr() not in covered)
    if extra or wrong or missing:
        parts = [
            f"{len(names)} tensors {what} (first: {names[0]})"
            for names, what in ((missing, "missing"), (extra, "unknown"), (wrong, "of another shape"))
            if names
        ]
        raise UserError(
            OPTION, f"{path} does not fit the policy that its config describes: {'; '.join(parts)}"
        )
    policy.load_state_dict(saved, strict=False)
    for name, tensor in policy.state_dict().items():
        if name in saved and not torch.equal(tensor, saved[name].to(tensor)):
            raise UserError(OPTION, f"'{name}' differs from {path} after loading")


def check_part(module: torch.nn.Module, folder: Path, name: str) -> None:
    """Compare a frozen part outside the checkpoint with its files, bit for bit up to its precision.

    Its library fills what a file lacks with random numbers. Shared tensors are found by their storage; what
    the file holds beside (UMT5's decoder) is not looked at.

    Args:
        module: the part in memory.
        folder: where transformers or diffusers saved it, whole or in shards.
        name: of the part, for the message.

    Raises:
        UserError: a tensor is missing or differs; a file is broken.
    """
    state = module.state_dict()
    covered: set[int] = set()
    for path in part_weights(folder, BACKBONE):
        for key, tensor in read_weights(path, BACKBONE).items():
            if key not in state:
                continue
            held = state[key]
            if held.shape != tensor.shape or not torch.equal(held, tensor.to(held)):
                raise UserError(BACKBONE, f"'{key}' of the {name} differs from {path} after loading")
            covered.add(held.data_ptr())
    missing = sorted(key for key, tensor in state.items() if tensor.data_ptr() not in covered)
    if missing:
        raise UserError(
            BACKBONE, f"the {name} in {folder} lacks {len(missing)} tensors (first: {missing[0]})"
        )


def freeze(policy: torch.nn.Module) -> None:
    """Eval mode, no gradients."""
    policy.eval()
    for parameter in policy.parameters():
        parameter.requires_grad_(False)


@contextmanager
def quietly() -> Iterator[None]:
    """Keep back what libraries print while they build a model whose weights are about to be replaced."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def load_peft(policy: torch.nn.Module, folder: Path) -> None:
    """Put a PEFT (LoRA) adapter into ``policy``, in place, and check it against its file.

    The layers stay unmerged, as LeRobot runs them.

    Raises:
        UserError: the adapter does not fit the policy.
    """
    from peft import PeftModel, get_peft_model_state_dict

    saved = read_weights(folder / PEFT_WEIGHTS)
    try:
        loaded = PeftModel.from_pretrained(policy, str(folder), is_trainable=False)
    except Exception as error:
        raise UserError(OPTION, f"{folder} does not fit its base policy: {reason(error)}") from error
    state: dict[str, Any] = get_peft_model_state_dict(loaded)
    if set(state) != set(saved):
        odd = sorted(set(state) ^ set(saved))
        raise UserError(OPTION, f"{folder / PEFT_WEIGHTS} lacks or adds {len(odd)} tensors (first: {odd[0]})")
    for name, tensor in state.items():
        if not torch.equal(tensor, saved[name].to(tensor)):
            raise UserError(OPTION, f"'{name}' differs from {folder / PEFT_WEIGHTS} after loading")
