"""Adapter of LeRobot's ``pi05`` policy: as ``pi0``, but the prompt states the robot's state, in 256 bins."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from trimtab.adapters.conditioning import Conditioning
from trimtab.adapters.lerobot.pi import PiAdapter


class PI05Adapter(PiAdapter):
    """See ``PiAdapter``."""

    policy_type: ClassVar[str] = "pi05"

    def embed_suffix(self, conditioning: Conditioning, actions: Tensor, time: Tensor) -> tuple:
        return self.policy.model.embed_suffix(actions, time)
