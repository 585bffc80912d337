"""The frozen policies of a comparison: one for all tasks, or where a path names ``{task}``, one for each."""

from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lerobot.configs.default import DatasetConfig
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.folder import is_peft
from trimtab.adapters.checkpoint.identity import file_hash, hash_files, settings_hashes
from trimtab.policies.artefact import is_artefact
from trimtab.recipes.embedded_base.base import DEMONSTRATIONS
from trimtab.recipes.embedded_base.demonstrations import REPO_ID
from trimtab.recipes.support.option_dicts import filled
from trimtab.recipes.support.session import base_of
from trimtab.rl.algorithms.acting import LoadedBase


class Base:
    """A frozen policy: where it lies, what it is, and the demonstrations beside it.

    Attributes:
        options: load it from ``folder``, which may be a server.
        sha256, files: of its weights (``None``: a server shows none), and of what else makes it what it is.
        dataset: the demonstrations that are named, or those that an embedded base was made from.

    Raises:
        UserError: there is none, or it has been steered or fine-tuned.
    """

    def __init__(self, options: PolicyConfig, dataset: DatasetConfig | None) -> None:
        if is_artefact(options.path):
            raise UserError("--policy.path", f"{options.path} is already steered; name its base policy")
        self.options, self.folder, self.dataset = options, base_of(options), dataset
        local = self.folder if isinstance(self.folder, Path) else None
        if local and is_peft(local):
            raise UserError(
                "--policy.path", f"{self.folder} is a LoRA adapter; name the policy that it adapts"
            )
        self.sha256 = file_hash(local) if local else None
        self.files = settings_hashes(local) if local else {}
        if dataset is None and local and (local / DEMONSTRATIONS).is_dir():
            self.dataset = DatasetConfig(REPO_ID, root=str(local / DEMONSTRATIONS))

    @cached_property
    def loaded(self) -> LoadedBase:
        return LoadedBase(load_adapter(self.options), self.options, self.folder)

    def dataset_sha256(self) -> str | None:
        """Of what the demonstrations say of themselves and their episodes; ``None``: they are not here."""
        root = self.dataset and self.dataset.root
        paths = sorted((Path(root).expanduser() / "meta").rglob("*.*")) if root else []
        return hash_files(paths) if paths else None

    @property
    def text(self) -> str:
        """Its type, and which it is."""
        where = f"weights {self.sha256[:12]}" if self.sha256 else self.options.path
        return f"{self.loaded.adapter.policy_type}, {where}"


def env_of(env: EnvConfig, task: str) -> EnvConfig:
    """The environment of one task."""
    texts = {one.name: filled(getattr(env, one.name), task) for one in fields(env) if one.init}
    return replace(env, **texts | {"task": task}) if task else env


def names_task(value: Any) -> bool:
    """Whether ``{task}`` stands in a text of ``value``."""
    return filled(value, "") != value
