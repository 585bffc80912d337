"""How simulators render where there is no display."""

import os
import sys


def choose_gl_backend() -> None:
    """Let MuJoCo render without a display, in each of several processes on that process's own GPU.

    Works only before ``mujoco`` is first imported. What the user has set stays.
    """
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    rank, size = (os.environ.get(name, "") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if rank.isdecimal() and size.isdecimal() and int(size) > 1 and "MUJOCO_EGL_DEVICE_ID" not in os.environ:
        import torch  # heavy, and here it will be needed anyway

        device = render_device(int(rank), torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        if device is not None:
            os.environ["MUJOCO_EGL_DEVICE_ID"] = device


def render_device(rank: int, gpus: int, visible: str | None) -> str | None:
    """EGL's number of the GPU of local process ``rank``; ``None`` without a GPU.

    EGL counts all GPUs of the machine, CUDA those that CUDA_VISIBLE_DEVICES (``visible``) names.
    """
    named = [name for name in (visible or "").split(",") if name.strip().isdecimal()]
    if not gpus:
        return None
    return named[rank % len(named)].strip() if named else str(rank % gpus)
