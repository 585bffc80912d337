"""Noise spaces: from the actor's bounded output ``u`` to the noise tensor that a policy takes.

A new space is a config with ``build_unscaled``, a ``NoiseSpace`` beside it, and a line here.
"""

from trimtab.policies.noise_space.base import NoiseSpace, NoiseSpaceConfig
from trimtab.policies.noise_space.spaces import (
    ConstantNoiseConfig,
    FullNoiseConfig,
    KnotNoiseConfig,
    MaskedNoiseConfig,
    RepeatNoiseConfig,
    ResidualNoiseConfig,
)

__all__ = [
    "ConstantNoiseConfig",
    "FullNoiseConfig",
    "KnotNoiseConfig",
    "MaskedNoiseConfig",
    "NoiseSpace",
    "NoiseSpaceConfig",
    "RepeatNoiseConfig",
    "ResidualNoiseConfig",
]
