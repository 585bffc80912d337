"""The artefact of a run: the actor's weights and a reference to the base, never the base itself.

One folder for all: `trimtab eval` reads it, and LeRobot's commands do, as a policy of type ``trimtab``.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import draccus
import torch
from draccus.utils import DraccusException
from lerobot.configs import PreTrainedConfig
from safetensors.torch import save_file

from trimtab.adapters import PolicyAdapter, PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.files import CONFIG, WEIGHTS, read_weights, whole_folder
from trimtab.adapters.checkpoint.folder import commit_of, is_server, resolve_folder
from trimtab.adapters.checkpoint.identity import file_hash, placement, settings_hashes, weights_hash
from trimtab.adapters.checkpoint.weights import load_weights
from trimtab.adapters.errors import reason
from trimtab.policies.acting import ChunkPolicy
from trimtab.policies.actor import NoiseActor
from trimtab.policies.critic import CriticConfig, CriticEnsemble
from trimtab.policies.noise_samplers import steered_policy
from trimtab.policies.noise_space import NoiseSpaceConfig
from trimtab.policies.observe import Observer
from trimtab.policies.residual import ResidualActor
from trimtab.policies.steered.configuration_trimtab import FORMAT, TYPE, BaseReference, TrimtabConfig
from trimtab.policies.steered.processor_trimtab import write_processors

CRITIC, EDIT = "critic.safetensors", "edit.safetensors"
# How the base was loaded; of these, what may lie in a folder.
FOLDERS = ("tokenizer", "backbone", "base_path")
LOADED_WITH = ("dtype", "engine", "num_inference_steps", "n_action_steps", "rename_map", "remote", *FOLDERS)


@dataclass
class Steered:
    """A loaded artefact.

    Attributes:
        adapter: the frozen base it refers to.
        actor: the trained noise actor, in eval mode.
        base_folder: where the base was found: its folder, or the address of its server.
        config: the artefact's config.json.
        critic: of the base's chunks, where one is stored.
        base: how the base was loaded.
        edit: what changes chunks, where it is stored.
    """

    adapter: PolicyAdapter
    actor: NoiseActor
    base_folder: Path | str
    config: TrimtabConfig
    critic: CriticEnsemble | None
    base: PolicyConfig
    edit: ResidualActor | None = None

    def policy(
        self, deterministic: bool = True, num_candidates: int = 1, use_edit: bool = True
    ) -> ChunkPolicy:
        """How it acts: see ``steered_policy``; without ``use_edit`` chunks stay as the base makes them."""
        edit = self.edit if use_edit else None
        return steered_policy(self.actor, self.critic, deterministic, num_candidates, edit)


def save_artefact(
    folder: Path,
    actor: NoiseActor,
    noise: NoiseSpaceConfig,
    adapter: PolicyAdapter,
    base: PolicyConfig,
    base_folder: Path | str,
    training: dict[str, Any],
    critic: tuple[CriticEnsemble, CriticConfig] | None = None,
    beside: dict[str, str] | None = None,
    acting: dict[str, Any] | None = None,
    check: Callable[[Path], None] | None = None,
    edit: ResidualActor | None = None,
) -> Path:
    """Write the artefact so that ``folder`` appears whole or not at all.

    A base that is a local folder is referred to relative to the artefact, so that both can move together;
    so are the folders that it was loaded with (its tokenizer, its backbone, the base of a LoRA).

    Args:
        folder: where; an artefact of an earlier run there is replaced.
        actor, noise: the trained actor, and the config of its noise space.
        adapter, base, base_folder: what it steers, how that was named, and where it lies (or its server).
        training: facts about the run for whoever reads the file; ``deterministic`` is how it is to act.
        critic: of the base's chunks, for ``num_candidates``, and its config.
        beside: texts to write beside, by file name (a model card).
        acting: fields of the config that say how it acts, where they are not the defaults.
        check: called with the whole folder before it appears; where it raises, nothing is left.
        edit: what changes chunks, of the actor's size and with its encoder.
    """
    folder = folder.resolve()
    names = adapter.raw_names()
    looking = actor.space.uses_features or actor.encoder.image_shape or edit or critic
    config = TrimtabConfig(
        n_obs_steps=adapter.n_obs_steps,
        input_features={names[k]: v for k, v in adapter.config.input_features.items()},
        output_features=dict(adapter.config.output_features),
        device=adapter.device.type,
        base=_reference(adapter, base, base_folder, folder),
        noise=noise,
        noise_shape=list(adapter.noise_spec.shape),
        feature_dim=actor.encoder.vector_dim,
        observe=adapter.observer.config if adapter.observer and looking else None,
        actor=actor.config,
        critic=critic[1] if critic else None,
        critic_bounds=list(critic[0].bounds) if critic and critic[0].bounds else None,
        edit_scale=edit.scale if edit else 0.0,
        n_action_steps=adapter.chunk_shape[0],
        deterministic=bool(training.get("deterministic", True)),
        training=training,
        **(acting or {}),
    )
    steered = Steered(adapter, actor, base_folder, config, critic[0] if critic else None, base, edit)
    with whole_folder(folder) as work:
        write_files(steered, work)
        for name, text in (beside or {}).items():
            (work / name).write_text(text, encoding="utf-8")
        if check is not None:
            check(work)
        for file in work.iterdir():
            file.chmod(0o644)
    return folder


def write_files(steered: Steered, folder: Path) -> None:
    """The files of an artefact: its networks, its config as LeRobot writes one, its processors."""
    for module, name in ((steered.actor, WEIGHTS), (steered.critic, CRITIC), (steered.edit, EDIT)):
        if module is not None:
            tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
            save_file(tensors, folder / name)
    write_config(steered.config, folder / CONFIG)
    write_processors(folder, steered.adapter, steered.base, steered.base_folder)


def moved(steered: Steered, folder: Path) -> Steered:
    """The same for another ``folder``, from which the base's local folders lie elsewhere."""
    base = steered.config.base
    paths = {name: _relative(getattr(steered.base, name), folder) for name in FOLDERS}
    if isinstance(steered.base_folder, Path) and (base.path or "").startswith("."):
        paths["path"] = _relative(str(steered.base_folder), folder)
    return replace(steered, config=replace(steered.config, base=replace(base, **paths)))


def write_config(config: TrimtabConfig, path: Path) -> None:
    """Save a config as LeRobot does, type first."""
    path.write_text(json.dumps(draccus.encode(config, PreTrainedConfig), indent=2) + "\n", encoding="utf-8")


def _reference(
    adapter: PolicyAdapter, base: PolicyConfig, base_folder: Path | str, folder: Path
) -> BaseReference:
    """The base as the artefact in ``folder`` refers to it."""
    local = Path(base.path or "").expanduser().exists()
    values = {
        **vars(base),
        **{name: _relative(getattr(base, name), folder) for name in FOLDERS},
        "path": _relative(str(base_folder), folder) if local else base.path,
        # Of a Hub repository the commit, so that what happens to it later does not matter.
        "revision": base.revision if local else commit_of(base_folder) or base.revision,
        "device": None,
        "engine": PolicyConfig.engine,  # concerns the machine, as the device does
        "policy_type": adapter.policy_type,
        **adapter.identity(base_folder),
        "remote": base.remote,
    }
    return BaseReference(**values)


def _relative(value: Any, folder: Path) -> Any:
    """``value``, or where it is a folder here, its path from the artefact, which begins with a dot."""
    if not isinstance(value, str) or not Path(value).expanduser().exists():
        return value
    path = os.path.relpath(Path(value).expanduser().resolve(), folder)
    return path if path.startswith(".") else os.path.join(".", path)


def _as_steered(options: PolicyConfig, saved: BaseReference, folder: Path) -> PolicyConfig:
    """How the base was loaded when it was steered; what the user says anew comes first."""
    default, loading = PolicyConfig(), PolicyConfig(device=options.device)
    for name in LOADED_WITH:
        value = getattr(options, name)
        if value == getattr(default, name):
            value = getattr(saved, name)
            if name in FOLDERS and value and value.startswith("."):
                where = (folder / value).resolve()
                if not where.exists():
                    raise UserError(
                        f"--policy.{name}",
                        f"the {name} that the base of {folder} was loaded with is not where it was "
                        f"({where}); name where it lies now",
                    )
                value = str(where)
        setattr(loading, name, value)
    usual = vars(default.remote)
    anew = {name: value for name, value in vars(options.remote).items() if value != usual[name]}
    loading.remote = replace(saved.remote, **anew)
    return loading


def _check_base(adapter: PolicyAdapter, base: BaseReference, base_folder: Path, folder: Path) -> None:
    """Refuse a base whose settings or weights in memory are not those that were steered."""
    parts, known = adapter.frozen_parts(adapter.policy), base.files
    now = settings_hashes(base_folder, {name: part for name, (_, part) in parts.items()})
    odd = [name for name in sorted(known.keys() | now.keys()) if known.get(name) != now.get(name)]
    same_device = placement(adapter.policy).items() <= vars(base).items()  # else rounding may differ
    if not odd and same_device:
        in_memory = weights_hash(adapter.policy, *(part for part, _ in parts.values()))
        odd = [] if in_memory == base.weights_sha256 else ["the weights in memory"]
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


def read_config(folder: Path) -> TrimtabConfig:
    """The config of an artefact, or a UserError where there is none of this format."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError("--policy.path", f"{folder} is no artefact, it lacks {CONFIG}")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved.pop("type") != TYPE:
            raise ValueError(f"its type is not {TYPE}")
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']}, this version reads {FORMAT}: steer the base anew")
        if not isinstance(saved["base"]["path"], str):
            raise ValueError("base.path is no text")
        return draccus.decode(TrimtabConfig, saved)
    except (KeyError, TypeError, ValueError, AttributeError, DraccusException, UserError) as error:
        raise UserError(
            "--policy.path", f"{path} is not an artefact's config ({type(error).__name__}: {reason(error)})"
        ) from None


def load_artefact(options: PolicyConfig, config: TrimtabConfig | None = None) -> Steered:
    """Load an artefact and the base it refers to.

    Args:
        options: ``path`` is the artefact's folder; the rest says anew how to load its base.
        config: instead of the folder's config.json.

    Raises:
        UserError: a broken file, or a base that is missing or not the one that was steered.
    """
    folder = Path(options.path).expanduser().resolve()
    saved = config or read_config(folder)
    loading = _as_steered(options, saved.base, folder)
    load = _served_base if is_server(saved.base.path) else _local_base
    adapter, base_folder, loading = load(loading, saved.base, folder)
    shape = tuple(saved.noise_shape)
    if adapter.noise_spec.shape != shape:
        raise UserError(
            "--policy.path",
            f"the base takes noise of shape {adapter.noise_spec.shape}, the actor makes {shape}",
        )
    if saved.n_action_steps != adapter.chunk_shape[0] and (saved.critic or saved.edit_scale):
        raise UserError(
            "--policy.n_action_steps",
            f"{folder} holds a critic or edits of chunks of {saved.n_action_steps} actions; for chunks of "
            f"{adapter.chunk_shape[0]} steer the base with that",
        )
    # The base's own spec: which entries are live decides what a masked actor steers.
    space = saved.noise.build(replace(adapter.noise_spec, dtype=torch.float32))
    # Whoever seeds torch and then loads meets the draws that follow on loading the base itself.
    with torch.random.fork_rng(devices=[]):
        actor = NoiseActor(saved.feature_dim, space, saved.actor, saved.observe)
        critic = edit = None
        size = math.prod(adapter.chunk_shape)
        if saved.critic is not None:
            bounds = saved.critic_bounds
            within: Any = tuple(bounds) if bounds else None
            critic = CriticEnsemble(actor.encoder.dim, size, saved.critic, within).eval()
        if saved.edit_scale:
            edit = ResidualActor(actor.encoder.dim, size, saved.edit_scale, saved.actor).eval()
    for module, name in ((actor, WEIGHTS), (critic, CRITIC), (edit, EDIT)):
        if module is None:
            continue
        if not (folder / name).is_file():
            raise UserError("--policy.path", f"{folder} is not a whole artefact, it lacks {name}")
        load_weights(module, read_weights(folder / name), folder / name)
    adapter.observer = Observer(saved.observe, adapter) if saved.observe else None
    return Steered(adapter, actor.eval(), base_folder, saved, critic, loading, edit)


Loaded = tuple[PolicyAdapter, Path | str, PolicyConfig]  # the base, where it was found, how to load it so


def _served_base(loading: PolicyConfig, base: BaseReference, folder: Path) -> Loaded:
    """The base on a policy server, asked as it was when it was steered, if it still answers likewise."""
    if base.answer is None:
        raise UserError("--policy.path", f"{folder} steers a policy in a folder, not on a server")
    address = loading.base_path or base.location(folder)
    loading = replace(loading, path=address, base_path=None)
    adapter = load_adapter(loading)
    adapter.check_identity({"answer": base.answer, "tolerance": base.tolerance}, address)
    return adapter, address, loading


def _local_base(loading: PolicyConfig, base: BaseReference, folder: Path) -> Loaded:
    """The base of a folder or a Hub repository, if it is the one that was steered."""
    location = base.location(folder)
    try:
        base_folder = resolve_folder(location, base.revision)
    except UserError as error:
        why = error.message
        if location.startswith("."):  # relative to the artefact, and so says nothing to the reader
            why = (
                f"there is no folder {(folder / location).resolve()}; if it has moved, `trimtab export "
                f"--run={folder} --policy.path=FOLDER` writes an artefact with its new location"
            )
        raise UserError("--policy.path", f"the base policy of {folder} is not where it was: {why}") from None
    if file_hash(base_folder, loading.base_path) != base.sha256:
        raise UserError(
            "--policy.path",
            f"{base_folder} is not the base that {folder} steers: its weights have another hash",
        )
    adapter = load_adapter(replace(loading, path=str(base_folder)))
    _check_base(adapter, base, base_folder, folder)
    return adapter, base_folder, replace(loading, path=location, revision=base.revision)
