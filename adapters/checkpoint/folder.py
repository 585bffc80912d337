"""Where a policy lies: a local folder, the Hub, or a server; and whether a folder holds a whole policy."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trimtab.adapters.checkpoint.files import (
    BACKBONE,
    CONFIG,
    OLD_STATISTICS,
    OPTION,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    POSTPROCESSOR,
    PREPROCESSOR,
    WEIGHTS,
    WEIGHTS_INDEX,
    has_weights,
    open_weights,
    read_json,
    whole_weights,
)
from trimtab.adapters.errors import UserError, policy_error, reason

REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")  # owner/name on the Hub
SMALL_FILES = (".json", ".txt", ".model", ".jinja")  # configs, tokenizers and processors


def is_server(path: str | Path | None) -> bool:
    """Whether a policy's path is the address of a policy server."""
    return isinstance(path, str) and path.startswith(("ws://", "wss://"))


def find_folder(
    name: str,
    option: str,
    revision: str | None = None,
    token: str | None = None,
    suffixes: tuple[str, ...] = SMALL_FILES,
    mend: str = "",
) -> Path:
    """A local folder, or the Hub's copy of a repository: its files with ``suffixes``.

    Where there is nothing by the ``name`` that ``option`` gave, the error ends in ``mend``.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    if not REPOSITORY.fullmatch(name):
        if "://" in name:
            mend = "; name a folder, a Hub repository as owner/name, or a policy server as ws://host:port"
        elif REPOSITORY.fullmatch(name.partition("@")[0]):
            mend = f"; name the Hub repository {name.partition('@')[0]}, its branch, tag or commit apart"
            mend += f" (--policy.revision={name.partition('@')[2]})"
        raise UserError(option, f"there is no folder {name}{mend}")
    from huggingface_hub import snapshot_download

    try:
        patterns = [f"*{suffix}" for suffix in suffixes]
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
    except Exception as error:  # the Hub client has a dozen exceptions for "not available"
        wanted = f"{name} at revision {revision}" if revision else name
        why = f"{type(error).__name__}: {reason(error)}"
        if folder.parent != Path() and folder.parent.is_dir():  # a folder is meant
            beside = sorted(one.name for one in folder.parent.iterdir())[:8]
            why = f"{folder.parent} holds {', '.join(beside)}"
        raise UserError(
            option, f"neither a folder nor a reachable Hub repository: {wanted} ({why}){mend}"
        ) from None


def resolve_folder(path: str, revision: str | None = None, token: str | None = None) -> Path:
    """The local folder of a whole policy, fetched from the Hub where ``path`` is a repository."""
    folder = find_folder(path, OPTION, revision, token, (*SMALL_FILES, ".safetensors"))
    if not folder.is_dir():
        raise policy_error(f"{path} is a file; name the folder that holds {CONFIG}")
    nested = folder / "pretrained_model"
    if not (folder / CONFIG).exists() and (nested / CONFIG).exists():
        folder = nested  # a checkpoint folder of lerobot-train
    _check_whole(folder)
    return folder


def _check_whole(folder: Path) -> None:
    """Refuse a folder that lacks a file which a saved policy has, and say what is there instead."""
    missing = [] if (folder / CONFIG).is_file() else [CONFIG]
    if not missing and is_peft(folder):
        missing += [name for name in (PEFT_CONFIG, PEFT_WEIGHTS) if not (folder / name).is_file()]
        if missing and has_weights(folder):
            raise policy_error(
                f"{folder / CONFIG} says use_peft, but {' and '.join(missing)} is not there, only "
                "whole weights; if the LoRA has been merged into them, set use_peft to false"
            )
    elif not has_weights(folder):
        missing.append(WEIGHTS)
    processors = [name for name in (PREPROCESSOR, POSTPROCESSOR) if not (folder / name).is_file()]
    if len(processors) < 2 or missing or not _holds_statistics(folder):
        missing += processors
    if not missing:
        return
    there = sorted(file.name for file in folder.iterdir()) or ["nothing"]
    inside = sorted(folder.glob(f"checkpoints/*/pretrained_model/{CONFIG}"))
    if not inside and CONFIG not in missing and any(folder.glob("*.safetensors")):
        from trimtab.adapters.checkpoint.saved_config import read_policy_type

        read_policy_type(folder)  # raises where the weights are another library's, whatever else is there
    if inside:
        hint = f"its last checkpoint is {inside[-1].parent}"
    elif WEIGHTS in missing and any(folder.glob("model-*-of-*.safetensors")):
        hint = f"{WEIGHTS_INDEX}, which says what lies in which shard, was not copied"
    elif missing == processors and is_peft(folder):
        hint = "a LoRA has them beside it: copy the files policy_*processor* of its training, or its base's"
    elif missing == processors:
        hint = (
            "LeRobot has written them since 0.4; a checkpoint from before holds its statistics among the "
            "weights, and this one holds none there"
        )
    else:
        hint = "`lerobot-train` writes one under checkpoints/<step>/pretrained_model"
    shown = ", ".join(there[:12]) + (f" and {len(there) - 12} more" if len(there) > 12 else "")
    raise policy_error(
        f"{folder} is not a whole policy folder, it lacks {', '.join(missing)} (it holds {shown}); {hint}"
    )


def _holds_statistics(folder: Path) -> bool:
    """Whether the statistics lie among the weights, as LeRobot kept them before it saved processors (0.4)."""
    if not has_weights(folder) or is_peft(folder):
        return False
    for path in whole_weights(folder):
        with open_weights(path) as file:
            if any(name.startswith(OLD_STATISTICS) for name in list(file.keys())):
                return True
    return False


def commit_of(folder: Path | str) -> str | None:
    """The commit whose files a folder in the Hub's cache holds; ``None`` of any other folder."""
    return folder.name if isinstance(folder, Path) and folder.parent.name == "snapshots" else None


def is_peft(folder: Path) -> bool:
    """Whether the folder's weights are those of a PEFT (LoRA) adapter: by ``use_peft``, as for LeRobot."""
    use_peft = read_json(folder / CONFIG).get("use_peft") if (folder / CONFIG).is_file() else None
    adapter = (folder / PEFT_CONFIG).is_file() or (folder / PEFT_WEIGHTS).is_file()
    if not has_weights(folder):
        return use_peft is True or adapter
    if adapter and not isinstance(use_peft, bool):
        raise policy_error(
            f"{folder} holds whole weights and a LoRA ({PEFT_WEIGHTS}), and its {CONFIG} does not say which "
            "counts: set use_peft to true (the LoRA, on its base) or to false (the whole weights)"
        )
    return use_peft is True


def peft_base(folder: Path, base_path: str | None) -> Path:
    """The folder of the policy that a PEFT checkpoint adapts: ``base_path``, or what the checkpoint says."""
    saved = read_json(folder / PEFT_CONFIG)
    named = base_path or saved.get("base_model_name_or_path")
    if not named:
        raise policy_error(f"{folder / PEFT_CONFIG} names no base policy; add --policy.base_path=")
    option = "--policy.base_path"
    try:
        base = resolve_folder(named, None if base_path else saved.get("revision"))
    except UserError as error:
        raise UserError(
            option, f"the base policy of the LoRA checkpoint {folder} was not found: {error.message}"
        ) from None
    if is_peft(base):
        raise UserError(option, f"{base} is a LoRA checkpoint itself; name the policy below both, merged")
    return base


def weights_files(folder: Path, base_path: str | None = None) -> list[Path]:
    """The files with a policy's weights; of a PEFT checkpoint the adapter's and then its base's."""
    if is_peft(folder):
        return [folder / PEFT_WEIGHTS, *whole_weights(peft_base(folder, base_path))]
    return whole_weights(folder)


def backbone_folder(name: str, revision: str | None = None) -> Path:
    """The folder with a backbone's config, tokenizer and processors; its weights are not fetched."""
    return find_folder(
        name, BACKBONE, revision, mend="; name a folder with the backbone's config and processors"
    )


@contextmanager
def without_weights(config: Any, *fields: str) -> Iterator[None]:
    """While entered, ``fields`` of a policy's config name copies of its backbones without weights.

    The policy's checkpoint holds them, but LeRobot loads, or downloads, the original ones first. Beside an
    empty weights file it builds the same model with random ones, which the checkpoint replaces.
    """
    from safetensors.torch import save_file

    names = {field: getattr(config, field) for field in fields}
    with TemporaryDirectory() as root:
        try:
            for field, name in names.items():
                folder = backbone_folder(name)
                if not (folder / CONFIG).is_file():
                    raise UserError(
                        BACKBONE, f"{folder} holds no {CONFIG}; name a folder with the backbone's config"
                    )
                copy = Path(root) / field
                copy.mkdir()
                for file in folder.iterdir():
                    if file.suffix in SMALL_FILES and not file.name.endswith(".index.json"):
                        shutil.copy(file, copy)
                save_file({}, copy / WEIGHTS, metadata={"format": "pt"})
                setattr(config, field, str(copy))
            yield
        finally:
            vars(config).update(names)
