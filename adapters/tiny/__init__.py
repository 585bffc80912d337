"""Tiny random instances of the real LeRobot classes, saved with their processors as `lerobot-train` would.

They load on any machine without the Hub, in milliseconds to seconds: for ``--tiny=true``. The tests add those
of the other policy types (``tests/helpers/tiny``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.adapters import PolicyConfig
from trimtab.adapters.tiny.policies import BUILDERS


def make_tiny(policy_type: str, folder: Path, **fields: Any) -> PolicyConfig:
    """Save a tiny random policy of ``policy_type`` and return how to load it.

    Args:
        policy_type: one of ``BUILDERS``.
        folder: where; the tokenizer or backbone that the policy names lies in it too.
        fields: fields of the policy's config that shall differ, and arguments of its builder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return PolicyConfig(path=str(folder), device="cpu", **BUILDERS[policy_type](folder, **fields))
