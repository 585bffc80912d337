"""Tiny random instances of the real LeRobot classes, saved with their processors as `lerobot-train` would.

They load on any machine without the Hub, in milliseconds to seconds: for tests, for the table of policies,
and to run a recipe before there is a checkpoint. One file per policy type; each has
``build(folder, **config_fields)`` and names in ``options`` what has to be said when the folder is loaded.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from trimtab.adapters import PolicyConfig, UserError

# Policy types with a whole tiny instance.
TYPES = tuple(
    sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py") if p.stem not in ("parts", "server"))
)


def make_tiny(policy_type: str, folder: Path, **fields: Any) -> PolicyConfig:
    """Save a tiny random policy of ``policy_type`` and return how to load it.

    Args:
        policy_type: LeRobot's name.
        folder: where; the tokenizer or backbone that the policy names lies in it too.
        fields: fields of the policy's config that shall differ.

    Raises:
        UserError: there is no tiny instance of this type.
    """
    if policy_type not in TYPES:
        raise UserError(
            "--policy.type", f"no tiny instance of '{policy_type}'; there is one of {', '.join(TYPES)}"
        )
    module = import_module(f"trimtab.adapters.tiny.{policy_type}")
    folder.mkdir(parents=True, exist_ok=True)
    options = module.build(folder, **fields) or {}
    return PolicyConfig(path=str(folder), device="cpu", **options)
