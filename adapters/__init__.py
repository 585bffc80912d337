"""Adapters: frozen LeRobot policies as functions (observation, noise) -> action chunk."""

from importlib import import_module

from trimtab.adapters.base import (
    NoiseSpec,
    PolicyAdapter,
    adapter_types,
    register_adapter,
)
from trimtab.adapters.conditioning import Conditioning
from trimtab.adapters.config import PolicyConfig
from trimtab.adapters.errors import UserError
from trimtab.adapters.loading import load_adapter

# LeRobot's policy types; each has a module of its name here, with the class named.
BUILT_IN = {
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
}


def _register(policy_type: str, name: str) -> None:
    register_adapter(
        policy_type, lambda: getattr(import_module(f"trimtab.adapters.lerobot.{policy_type}"), name)
    )


for _type, _name in BUILT_IN.items():
    _register(_type, _name)

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
