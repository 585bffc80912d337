"""Adapters: frozen LeRobot policies as functions (observation, noise) -> action chunk."""

from trimtab.adapters.base import NoiseSpec
from trimtab.adapters.conditioning import Conditioning
from trimtab.adapters.config import PolicyConfig
from trimtab.adapters.errors import UserError, policy_error
from trimtab.adapters.loading import load_adapter
from trimtab.adapters.policy_adapter import PolicyAdapter
from trimtab.adapters.registry import adapter_types, register_adapter

__all__ = [
    "Conditioning",
    "NoiseSpec",
    "PolicyAdapter",
    "PolicyConfig",
    "UserError",
    "adapter_types",
    "load_adapter",
    "policy_error",
    "register_adapter",
]
