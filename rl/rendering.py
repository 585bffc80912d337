"""How simulators render where there is no display."""

from __future__ import annotations

import os
import sys


def choose_gl_backend() -> None:
    """Let MuJoCo render without a display. Works only before ``mujoco`` is first imported."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
