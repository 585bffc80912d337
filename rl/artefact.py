"""The artefact of a run: the actor's weights and a reference to the base, never the base itself."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import draccus
import torch
from draccus.utils import DraccusException
from safetensors.torch import save_file

from trimtab.adapters import NoiseSpec, PolicyAdapter, PolicyConfig, UserError, load_adapter
from trimtab.adapters.config import RemoteConfig
from trimtab.adapters.errors import reason
from trimtab.adapters.files import CONFIG, WEIGHTS, file_hash, is_server, read_weights, resolve_folder
from trimtab.adapters.loading import load_weights
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.noise_space import NoiseSpaceConfig

TYPE = "trimtab"
FORMAT = 1


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

    A base that is a local folder is referred to relative to the artefact, so that both can move together.

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
            "num_inference_steps": base.num_inference_steps,
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
        revision, steps = base["revision"], base["num_inference_steps"]
        sha256 = None if is_server(base["path"]) else base["sha256"]
        noise = draccus.decode(NoiseSpaceConfig, saved["noise"])
        actor_config, feature_dim = ActorConfig(**saved["actor"]), int(saved["feature_dim"])
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
        try:
            base_folder = resolve_folder(path, revision)
        except UserError as error:
            raise UserError(
                "--policy.path", f"the base policy of {folder} is not where it was: {error.message}"
            ) from None
        if file_hash(base_folder) != sha256:
            raise UserError(
                "--policy.path",
                f"{base_folder} is not the base that {folder} steers: its weights have another hash",
            )
        adapter = load_adapter(
            PolicyConfig(
                path=str(base_folder),
                device=config.device,
                num_inference_steps=config.num_inference_steps or steps,
            )
        )
    if adapter.noise_spec.shape != shape:
        raise UserError(
            "--policy.path",
            f"the base takes noise of shape {adapter.noise_spec.shape}, the actor makes {shape}",
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError("--policy.path", f"{folder} is not a whole artefact, it lacks {WEIGHTS}")
    actor = NoiseActor(feature_dim, noise.build(NoiseSpec(shape, dtype=torch.float32)), actor_config)
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
