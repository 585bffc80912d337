"""Adapter of LeRobot's ``pi0`` policy: PaliGemma and an action expert; the state is a token of the expert."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from trimtab.adapters.conditioning import Conditioning
from trimtab.adapters.lerobot.pi import PiAdapter


class PI0Adapter(PiAdapter):
    """See ``PiAdapter``."""

    policy_type: ClassVar[str] = "pi0"

    def embed_suffix(self, conditioning: Conditioning, actions: Tensor, time: Tensor) -> tuple:
        return self.policy.model.embed_suffix(conditioning.rows("state"), actions, time)
