"""Load a LeRobot policy folder into an adapter, and prove that what was loaded is what was saved."""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.checkpoint import processors, weights
from trimtab.adapters.checkpoint.files import OLD_STATISTICS, PREPROCESSOR, processor_steps, read_weights
from trimtab.adapters.checkpoint.folder import is_peft, is_server, resolve_folder, weights_files
from trimtab.adapters.checkpoint.saved_config import read_config, read_policy_type, set_to_act
from trimtab.adapters.config import DTYPES, PolicyConfig
from trimtab.adapters.engine import ENGINES, say, use_engine
from trimtab.adapters.errors import UserError, at_least, policy_error, reason
from trimtab.adapters.memory import check_weights
from trimtab.adapters.policy_adapter import PolicyAdapter
from trimtab.adapters.registry import adapter_class, adapter_types

# Policies whose sampling has no continuous noise to steer.
NO_NOISE = {
    "pi0_fast": "it writes action tokens one after another and draws no noise",
    "vqbet": "it draws categorical codes, not continuous noise",
    "tdmpc": "it plans with a learnt model instead of denoising",
    "gaussian_actor": "it is itself an RL actor",
}


def load_adapter(config: PolicyConfig) -> PolicyAdapter:
    """Load, check, freeze and wrap the policy that ``config`` names.

    ``UserError`` where the folder is missing, half-written or broken, the type cannot be steered, the policy
    samples at random or ignores its noise, or no policy server answers.
    """
    adapter = open_adapter(config)
    try:
        adapter.verify()
    except BaseException as error:
        adapter.close()
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        hint = f"; try another --policy.dtype than {config.dtype}" if config.dtype else ""
        raise policy_error(f"{config.path} loads but does not run: {reason(error)}{hint}") from error
    use_engine(adapter, config.engine)
    return adapter


def open_adapter(config: PolicyConfig) -> PolicyAdapter:
    """``load_adapter`` without ``verify`` and the engine, for whoever reports what ``verify`` would find."""
    if not config.path:
        raise policy_error("name the folder or Hub repository of the base policy")
    at_least(1, config, "--policy.", "num_inference_steps")
    if config.dtype is not None and config.dtype not in DTYPES:
        raise UserError("--policy.dtype", f"must be one of {', '.join(DTYPES)}, got {config.dtype}")
    if config.engine not in ENGINES:
        raise UserError("--policy.engine", f"must be one of {', '.join(ENGINES)}, got {config.engine}")
    if is_server(config.path):
        from trimtab.adapters.remote.adapter import RemoteAdapter

        return RemoteAdapter(config, _device(config.device))
    folder = resolve_folder(config.path, config.revision)
    policy_type = read_policy_type(folder)
    device = _device(config.device)
    try:
        cls = adapter_class(policy_type)
        if cls is None and policy_type in NO_NOISE:
            raise policy_error(f"a policy of type '{policy_type}' cannot be steered: {NO_NOISE[policy_type]}")
        if cls is None:
            raise policy_error(
                f"no adapter for policies of type '{policy_type}' yet; there is one for "
                f"{', '.join(adapter_types())} (write your own: adapters/README.md)"
            )
        return _build(cls, folder, config, device)
    except UserError:
        raise
    except ImportError as error:
        raise policy_error(
            f"a {policy_type} policy needs what is not installed ({reason(error)}); "
            "what LeRobot's own types need: pip install 'lerobot_policy_trimtab[policies]'"
        ) from error
    except Exception as error:  # whatever a library makes of a config or a file that nobody foresaw
        raise policy_error(f"{folder} cannot be loaded: {reason(error)}") from error


def _device(name: str | None) -> str:
    """The device ``name``, or the accelerator if there is one, else the CPU."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = name or best
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError("--policy.device", f"'{device}' is not usable here ({error})") from None
    return device


def _build(cls: type[PolicyAdapter], folder: Path, options: PolicyConfig, device: str) -> PolicyAdapter:
    peft = is_peft(folder)
    files = weights_files(folder, options.base_path)
    base_files = files[1:] if peft else files
    config = read_config(folder)
    config.device = device
    config.pretrained_path = base_files[0].parent
    _apply(cls, config, options)
    notes = set_to_act(config) + list(cls.prepare_config(config, options))
    overrides = cls.processor_overrides(config, options)
    if options.rename_map:
        overrides[processors.RENAME_STEP] = {"rename_map": options.rename_map}
    taken = _taken(cls, options, folder, overrides)
    read = read_weights(base_files, unchecked=OLD_STATISTICS)
    saved = weights.plain_names(read, base_files[0])
    if line := check_weights(saved, options.dtype, device):
        say(line)
    with quietly(), weights.no_larger_than(saved, base_files[0]):
        policy = cls.build(config)
    old = processors.take_statistics(saved, policy.state_dict())
    stats = processors.statistics(old, config, base_files[0]) if processors.is_legacy(folder) else None
    if stats is not None:
        notes.append(
            f"a checkpoint of LeRobot before 0.4: processors made of the {len(old)} statistics among its "
            "weights"
        )
    elif old:
        notes.append(
            f"{len(old)} statistics of an older LeRobot lie among the weights: left out for the saved "
            "processors'"
        )
    saved = cls.prepare_weights(saved, policy)
    weights.load_weights(policy, saved, base_files[0], partial(weights.one_by_one, saved, read, base_files))
    if peft:
        weights.load_peft(policy, folder)
    policy.to(device)
    if options.dtype and not hasattr(config, "dtype"):
        cls.cast(policy, getattr(torch, options.dtype))
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    policy.eval().requires_grad_(False)
    for part, where in cls.frozen_parts(policy).values():
        part.eval().requires_grad_(False)
        weights.check_part(part, where)
    try:
        pre, post = processors.load_processors(config, folder, overrides, stats)
    except Exception as error:
        raise processors.processor_error(error, folder, options, taken) from error
    notes += processors.check_processors(pre, post, config, folder, base_files[0])
    adapter = cls(policy, pre, post)
    steps = adapter.chunk_shape[0]
    if options.n_action_steps not in (None, steps):
        raise UserError(
            "--policy.n_action_steps",
            f"this {config.type} policy executes {steps} steps of each chunk; drop the option",
        )
    if min(adapter.chunk_shape) < 1:  # of a horizon that ends before the last of the observations
        raise policy_error(f"by its config.json, of each chunk it executes {steps} actions; it must be 1")
    adapter.notes = [*notes, *_runner_notes(adapter)]
    adapter.trainable = trainable
    adapter.weights_files = files
    return adapter


def _taken(
    cls: type[PolicyAdapter], options: PolicyConfig, folder: Path, overrides: dict[str, Any]
) -> set[str]:
    """Which of ``tokenizer`` and ``backbone`` have an effect; refuse what is named in vain."""
    absent: set[str] = set()  # steps that are to be changed and are not there
    if (options.tokenizer or options.rename_map) and not processors.is_legacy(folder):
        absent = overrides.keys() - dict(processor_steps(folder / PREPROCESSOR)).keys()
    if processors.RENAME_STEP in absent:
        raise UserError(
            "--policy.rename_map", f"{folder / PREPROCESSOR} has no step that renames observations"
        )
    taken = {"backbone"} if cls.backbone_fields else set()
    if cls.takes_tokenizer and not (options.tokenizer and absent):
        taken.add("tokenizer")
    for name in ("tokenizer", "backbone"):
        if getattr(options, name) and name not in taken:
            mend = "name --policy.backbone" if "backbone" in taken else "drop the option"
            raise UserError(
                f"--policy.{name}", f"a {cls.policy_type} policy has no {name} of its own to be named; {mend}"
            )
    return taken


def _apply(cls: type[PolicyAdapter], config: Any, options: PolicyConfig) -> None:
    """Set the options in the policy's config; refuse those with which the policy does not run."""
    dtype = options.dtype or getattr(config, "dtype", None)
    if dtype and cls.dtypes and dtype not in cls.dtypes:
        raise UserError(
            "--policy.dtype", f"this {cls.policy_type} policy runs in {' or '.join(cls.dtypes)}, not {dtype}"
        )
    values: dict[str, Any] = {field: options.backbone for field in cls.backbone_fields}
    if hasattr(config, cls.dtype_field):
        values[cls.dtype_field] = options.dtype
    if cls.steps_field:
        values[cls.steps_field] = options.num_inference_steps
    steps = values["n_action_steps"] = options.n_action_steps
    most = getattr(config, "chunk_size", None)
    if most is None and hasattr(config, "horizon"):  # the chunk begins at the first of the observations
        most = config.horizon - config.n_obs_steps + 1
    if steps is not None and (most is None or not hasattr(config, "n_action_steps")):
        raise UserError(
            "--policy.n_action_steps", f"has no effect on a {config.type} policy; drop the option"
        )
    if steps is not None and not 1 <= steps <= most:
        raise UserError("--policy.n_action_steps", f"must be between 1 and {most}, got {steps}")
    for field, value in values.items():
        if value is not None:
            setattr(config, field, value)


def _runner_notes(adapter: PolicyAdapter) -> list[str]:
    """Where LeRobot's own commands compute otherwise than the adapter, a line each."""
    notes = []
    if getattr(adapter.config, "use_amp", False):
        notes.append(
            "use_amp is on in config.json: lerobot-eval runs this policy under autocast, lerobot-rollout "
            "on CUDA alone, the policy server nowhere; trimtab and what it exports compute in the "
            "policy's own precision"
        )
    if adapter.relative_actions and adapter.chunk_shape[0] > 1:
        notes.append(
            "relative actions: trimtab adds a chunk to the state that it was made for, lerobot-eval and "
            "lerobot-rollout add each action to the state at its own step"
        )
    return notes


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
