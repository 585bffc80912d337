"""Adapters: frozen LeRobot policies as functions (observation, noise) -> action chunk."""

from trimtab.adapters.base import (
    Conditioning,
    NoiseSpec,
    PolicyAdapter,
    adapter_types,
    register_adapter,
)
from trimtab.adapters.errors import UserError
from trimtab.adapters.loading import PolicyConfig, load_adapter


def _diffusion() -> type[PolicyAdapter]:
    from trimtab.adapters.diffusion import DiffusionAdapter

    return DiffusionAdapter


register_adapter("diffusion", _diffusion)

__all__ = [
    "Conditioning",
    "NoiseSpec",
    "PolicyAdapter",
    "PolicyConfig",
    "UserError",
    "adapter_types",
    "load_adapter",
    "register_adapter",
]
