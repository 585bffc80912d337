"""Which adapter class serves a policy type; a class is imported on its first use."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

from trimtab.adapters.policy_adapter import PolicyAdapter

_REGISTRY: dict[str, Callable[[], type[PolicyAdapter]]] = {}


def register_adapter(policy_type: str, loader: Callable[[], type[PolicyAdapter]]) -> None:
    """Register an adapter class for a LeRobot policy type, the ``type`` in the policy's ``config.json``.

    ``loader`` returns the class; it is called on first use, so that listing adapters imports nothing.
    """
    _REGISTRY[policy_type] = loader


def adapter_class(policy_type: str) -> type[PolicyAdapter] | None:
    """The adapter registered for a policy type, or ``None``."""
    loader = _REGISTRY.get(policy_type)
    return loader() if loader else None


def adapter_types() -> list[str]:
    """The policy types that have an adapter."""
    return sorted(_REGISTRY)


def _lerobot_adapter(policy_type: str) -> type[PolicyAdapter]:
    """The class of this type in the module of its name, or of both pi0 and pi05 in ``pi``."""
    module = import_module(f"trimtab.adapters.lerobot.{MODULES.get(policy_type, policy_type)}")
    return next(cls for cls in vars(module).values() if getattr(cls, "policy_type", None) == policy_type)


MODULES = {"pi0": "pi", "pi05": "pi"}
for _type in (
    *("act", "diffusion", "eo1", "evo1", "fastwam", "groot", "lingbot_va", "molmoact2", "multi_task_dit"),
    *("pi0", "pi05", "smolvla", "vla_jepa", "wall_x", "xvla"),
):
    register_adapter(_type, partial(_lerobot_adapter, _type))
