"""The artefact of a run: the actor's weights and a reference to the base, never the base itself."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import draccus
import torch
from draccus.utils import DraccusException
from safetensors.torch import save_file

from trimtab.adapters import PolicyAdapter, PolicyConfig, UserError, load_adapter
from trimtab.adapters.config import RemoteConfig
from trimtab.adapters.errors import reason
from trimtab.adapters.files import (
    CONFIG,
    WEIGHTS,
    file_hash,
    is_server,
    placement,
    read_weights,
    resolve_folder,
    settings_hashes,
    weights_hash,
)
from trimtab.adapters.loading import load_weights
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.noise_space import NoiseSpaceConfig

TYPE = "trimtab"
FORMAT = 1
# What artefacts from before these settings existed did, in settings.
OLD_ACTOR = {"mean_limit": 1.0}
# How the base was loaded; of these, what may lie in a folder.
LOADED_WITH = ("dtype", "num_inference_steps", "rename_map", "tokenizer", "backbone", "base_path")
PLACES = ("tokenizer", "backbone", "base_path")


@dataclass
class Steered:
    """A loaded artefact.

    Attributes:
        adapter: the frozen base it refers to.
        actor: the trained noise actor, in eval mode.
        base_folder: where the base was found: its folder, or the address of its server.
        config: the artefact's config.json.
    """

    adapter: PolicyAdapter
    actor: NoiseActor
    base_folder: Path | str
    config: dict[str, Any]


def save_artefact(
    folder: Path,
    actor: NoiseActor,
    noise: NoiseSpaceConfig,
    adapter: PolicyAdapter,
    base: PolicyConfig,
    base_folder: Path | str,
    training: dict[str, Any],
) -> Path:
    """Write the artefact so that ``folder`` appears whole or not at all.

    A base that is a local folder is referred to relative to the artefact, so that both can move together;
    so are the folders that it was loaded with (its tokenizer, its backbone, the base of a LoRA).

    Args:
        folder: where; an artefact of an earlier run there is replaced.
        actor: the trained actor.
        noise: config of its noise space.
        adapter: the base it was trained on.
        base: how the base was named.
        base_folder: where the base lies, or the address of its server.
        training: facts about the run for whoever reads the file.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    local = Path(base.path or "").expanduser().exists()
    config = {
        "type": TYPE,
        "format": FORMAT,
        "base": {
            "path": os.path.relpath(Path(base_folder).resolve(), folder) if local else base.path,
            "revision": base.revision,
            **{n: _place(getattr(base, n), folder) for n in LOADED_WITH},
            "policy_type": adapter.policy_type,
            **adapter.identity(base_folder),
        },
        "noise": draccus.encode(noise, NoiseSpaceConfig),
        "noise_shape": list(adapter.noise_spec.shape),
        "feature_dim": actor.normalizer.mean.numel(),
        "actor": asdict(actor.config),
        "training": training,
    }
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in actor.state_dict().items()}
        save_file(state, str(work / WEIGHTS))
        (work / WEIGHTS).chmod(0o644)
        (work / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        work.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return folder


def _place(value: Any, folder: Path) -> Any:
    """``value``, or where it is a folder here, the way there from the artefact, which begins with a dot."""
    if not isinstance(value, str) or not Path(value).expanduser().exists():
        return value
    way = os.path.relpath(Path(value).expanduser().resolve(), folder)
    return way if way.startswith(".") else os.path.join(".", way)


def _as_steered(config: PolicyConfig, saved: PolicyConfig, folder: Path) -> PolicyConfig:
    """How the base was loaded when it was steered; what the user says anew comes first.

    Raises:
        UserError: a folder that it was loaded with is not where it was.
    """
    default = PolicyConfig()
    for name in LOADED_WITH:
        value = getattr(saved, name)
        if getattr(config, name) != getattr(default, name):
            setattr(saved, name, getattr(config, name))
        elif name in PLACES and value and value.startswith("."):
            if not (folder / value).exists():
                raise UserError(
                    f"--policy.{name}",
                    f"the {name} that the base of {folder} was loaded with is not where it was "
                    f"({(folder / value).resolve()}); name where it lies now",
                )
            setattr(saved, name, str((folder / value).resolve()))
    return replace(saved, device=config.device)


def _check_base(adapter: PolicyAdapter, base: dict[str, Any], base_folder: Path, folder: Path) -> None:
    """Refuse a base that is another function than the one that was steered.

    The hash of its weights' file has been compared; artefacts from before there were others hold no more.
    """
    parts = adapter.frozen_parts(adapter.policy)
    odd: list[str] = []
    if "files" in base:
        known = base["files"]
        now = settings_hashes(base_folder, {name: place for name, (_, place) in parts.items()})
        odd = [name for name in sorted(known.keys() | now.keys()) if known.get(name) != now.get(name)]
    same_place = placement(adapter.policy).items() <= base.items()  # else rounding may differ
    if not odd and same_place:
        in_memory = weights_hash(adapter.policy, *(part for part, _ in parts.values()))
        odd = [] if in_memory == base["weights_sha256"] else ["the weights in memory"]
    if odd:
        raise UserError(
            "--policy.path", f"{base_folder} is not the base that {folder} steers: {', '.join(odd)} changed"
        )


def is_artefact(path: str | None) -> bool:
    """Whether ``path`` is a folder with the config of an artefact."""
    config = Path(path or "").expanduser() / CONFIG
    if not path or not config.is_file():
        return False
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("type") == TYPE
    except (ValueError, AttributeError):
        return False


def load_artefact(config: PolicyConfig) -> Steered:
    """Load an artefact and the base it refers to.

    Raises:
        UserError: a broken file, or a base that is missing or not the one that was steered.
    """
    folder = Path(config.path).expanduser().resolve()
    saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    try:
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']}, this version reads {FORMAT}")
        base, shape = saved["base"], tuple(int(length) for length in saved["noise_shape"])
        revision = base["revision"]
        loaded_with = draccus.decode(PolicyConfig, {n: base[n] for n in LOADED_WITH if n in base})
        sha256 = None if is_server(base["path"]) else base["sha256"]
        noise = draccus.decode(NoiseSpaceConfig, saved["noise"])
        actor_config, feature_dim = ActorConfig(**(OLD_ACTOR | saved["actor"])), int(saved["feature_dim"])
        candidate = folder / base["path"]
    except (KeyError, TypeError, ValueError, DraccusException, UserError) as error:
        raise UserError(
            "--policy.path",
            f"{folder / CONFIG} is not an artefact's config ({type(error).__name__}: {reason(error)})",
        ) from None
    path = str(candidate.resolve()) if candidate.exists() else base["path"]
    if sha256 is None:
        base_folder: Path | str = config.base_path or path
        adapter = _served_base(base_folder, base, config)
    else:
        options = _as_steered(config, loaded_with, folder)
        try:
            base_folder = resolve_folder(path, revision)
        except UserError as error:
            raise UserError(
                "--policy.path", f"the base policy of {folder} is not where it was: {error.message}"
            ) from None
        if file_hash(base_folder, options.base_path) != sha256:
            raise UserError(
                "--policy.path",
                f"{base_folder} is not the base that {folder} steers: its weights have another hash",
            )
        adapter = load_adapter(replace(options, path=str(base_folder)))
        _check_base(adapter, base, base_folder, folder)
    if adapter.noise_spec.shape != shape:
        raise UserError(
            "--policy.path",
            f"the base takes noise of shape {adapter.noise_spec.shape}, the actor makes {shape}",
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError("--policy.path", f"{folder} is not a whole artefact, it lacks {WEIGHTS}")
    # The base's own spec: which entries are live decides what a masked actor steers.
    space = noise.build(replace(adapter.noise_spec, dtype=torch.float32))
    actor = NoiseActor(feature_dim, space, actor_config)
    load_weights(actor, read_weights(folder / WEIGHTS), folder / WEIGHTS)
    return Steered(adapter, actor.eval(), base_folder, saved)


def _served_base(address: str, saved: dict[str, Any], config: PolicyConfig) -> PolicyAdapter:
    """The base on a policy server, asked as it was when it was steered, if it still answers likewise."""
    try:
        remote = RemoteConfig(**saved["remote"])
        identity = {name: saved[name] for name in ("answer", "tolerance")}
    except (KeyError, TypeError) as error:
        raise UserError(
            "--policy.path", f"the artefact does not say how {address} answers ({error})"
        ) from None
    if config.remote != RemoteConfig():  # the user says anew how to ask
        remote = config.remote
    adapter = load_adapter(PolicyConfig(path=address, device=config.device, remote=remote))
    adapter.check_identity(identity, address)
    return adapter
