"""A pi05 of 0.4 M weights, made as the tiny pi0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.adapters.tiny.pi0 import build_pi


def build(folder: Path, **fields: Any) -> dict[str, Any]:
    """See ``pi0.build``."""
    return build_pi("pi05", folder, **fields)
