"""Which adapter class serves a policy type; a class is imported on its first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

from trimtab.adapters.policy_adapter import PolicyAdapter

_REGISTRY: dict[str, Callable[[], type[PolicyAdapter]]] = {}


def register_adapter(policy_type: str, loader: Callable[[], type[PolicyAdapter]]) -> None:
    """Register an adapter class for a LeRobot policy type.

    Args:
        policy_type: the ``type`` in the policy's ``config.json``.
        loader: returns the class; called on first use, so that listing adapters imports nothing.
    """
    _REGISTRY[policy_type] = loader


def adapter_class(policy_type: str) -> type[PolicyAdapter] | None:
    """The adapter registered for a policy type, or ``None``."""
    loader = _REGISTRY.get(policy_type)
    return loader() if loader else None


def adapter_types() -> list[str]:
    """The policy types that have an adapter."""
    return sorted(_REGISTRY)


def _load(module: str, name: str) -> type[PolicyAdapter]:
    return getattr(import_module(f"trimtab.adapters.lerobot.{module}"), name)


# LeRobot's policy types, each with the class that serves it: in the module of its name, or in `pi`.
for _type, _name in {
    "act": "ACTAdapter",
    "diffusion": "DiffusionAdapter",
    "eo1": "EO1Adapter",
    "evo1": "Evo1Adapter",
    "fastwam": "FastWAMAdapter",
    "groot": "GrootAdapter",
    "lingbot_va": "LingBotVAAdapter",
    "molmoact2": "MolmoAct2Adapter",
    "multi_task_dit": "MultiTaskDiTAdapter",
    "pi0": "PI0Adapter",
    "pi05": "PI05Adapter",
    "smolvla": "SmolVLAAdapter",
    "vla_jepa": "VLAJEPAAdapter",
    "wall_x": "WallXAdapter",
    "xvla": "XVLAAdapter",
}.items():
    register_adapter(_type, partial(_load, "pi" if _type.startswith("pi0") else _type, _name))
