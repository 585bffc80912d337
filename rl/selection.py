"""Acting on the chunk: execute the best of N by a critic, or the base's own with a correction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from lerobot.envs.configs import EnvConfig
from torch import Tensor

from trimtab.adapters import PolicyAdapter
from trimtab.rl.runner import Encoded, PolicyRunner


class SelectingRunner(PolicyRunner):
    """A runner whose noise is N candidates per observation, of which ``select`` takes one.

    Give it to ``evaluate`` with ``candidate_noise`` as the source: an episode's N draws then come from its
    own generator, as one draw does otherwise.

    Args:
        adapter: the frozen policy.
        env_config: the environment's LeRobot config.
        select: (B, d), (B, N, steps, action_dim) -> (B,).
        count: N.
    """

    def __init__(
        self,
        adapter: PolicyAdapter,
        env_config: EnvConfig,
        select: Callable[[Tensor, Tensor], Tensor],
        count: int,
    ) -> None:
        super().__init__(adapter, env_config)
        self.select, self.count = select, count

    def prior(self, batch: int, generator: torch.Generator) -> Tensor:
        """N fresh draws for each of ``batch`` observations, (batch, N, *noise_spec.shape)."""
        drawn = super().prior(batch * self.count, generator)
        return drawn.unflatten(0, (batch, self.count))

    def decode(
        self, conditioning: Encoded, noise: Tensor, slots: Sequence[int] | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """Executable actions (B, steps, action_dim) of the selected candidates.

        Args:
            conditioning: from ``encode``.
            noise: (B, N, *noise_spec.shape), the candidates.
            slots: as for ``PolicyRunner.decode``.

        Raises:
            UserError: the policy denoises one sample at a time from a memory of its own.
        """
        chunks = self.candidates(conditioning, noise)
        index = self.select(self.features(conditioning), chunks).cpu()
        return self.executable(chunks[torch.arange(len(chunks)), index], conditioning)


class CorrectingRunner(PolicyRunner):
    """A runner whose chunks are corrected before they are executed.

    Give it to ``evaluate`` with the base's own noise as the source.

    Args:
        adapter: the frozen policy.
        env_config: the environment's LeRobot config.
        correct: (B, d), (B, steps, action_dim) -> (B, steps, action_dim), of normalised chunks.
    """

    def __init__(
        self, adapter: PolicyAdapter, env_config: EnvConfig, correct: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__(adapter, env_config)
        self.correct = correct

    def decode(
        self, conditioning: Encoded, noise: Tensor, slots: Sequence[int] | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """Executable actions (B, steps, action_dim) of the corrected chunks; as ``PolicyRunner.decode``.

        Raises:
            UserError: the policy denoises one sample at a time from a memory of its own.
        """
        chunks = self.candidates(conditioning, noise.unsqueeze(1))[:, 0]
        return self.executable(self.correct(self.features(conditioning), chunks), conditioning)
