"""Tiny random instances of the real LeRobot classes, saved with their processors as `lerobot-train` would.

They load on any machine without the Hub, in milliseconds to seconds: for tests, for the table of policies,
and to run a recipe before there is a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.adapters import PolicyConfig, UserError
from trimtab.adapters.tiny.policies import BUILDERS

TYPES = tuple(BUILDERS)  # policy types with a whole tiny instance


def make_tiny(policy_type: str, folder: Path, **fields: Any) -> PolicyConfig:
    """Save a tiny random policy of ``policy_type`` and return how to load it.

    Args:
        policy_type: LeRobot's name.
        folder: where; the tokenizer or backbone that the policy names lies in it too.
        fields: fields of the policy's config that shall differ, and arguments of its builder.

    Raises:
        UserError: there is no tiny instance of this type.
    """
    if policy_type not in BUILDERS:
        raise UserError(
            "--policy.type", f"no tiny instance of '{policy_type}'; there is one of {', '.join(TYPES)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return PolicyConfig(path=str(folder), device="cpu", **BUILDERS[policy_type](folder, **fields))
