"""What configs of one task answer alike (``hooks.py``)."""

import copy
from typing import ClassVar, Self

from lerobot.envs.configs import EnvConfig


class OneTaskConfig(EnvConfig):
    """An environment of one task, by its name or else its type, that knows what the policy reads."""

    # By input feature of the policy, before it is renamed: its shape. ``None``: not known.
    wanted: ClassVar[dict[str, tuple[int, ...]] | None] = None

    def task_names(self) -> list[str]:
        """The one task."""
        return [self.task or self.type]

    def for_policy(self, features: dict[str, tuple[int, ...]]) -> Self:
        """This config for a policy with these input features: shapes by the environment's name for them."""
        config = copy.copy(self)
        config.wanted = features  # type: ignore[misc]
        return config
