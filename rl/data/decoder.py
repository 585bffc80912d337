"""Decoding of replayed observations: for algorithms that ask the frozen policy while they learn.

The replay keeps what ``adapter.encode`` made of each observation, so that the policy can be asked again what
it makes of other noises. That is for small policies: the conditioning of a vision-language-action model takes
megabytes (its prefix cache), that of a state-based diffusion policy some hundred numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimtab.adapters import Conditioning, PolicyAdapter, UserError
from trimtab.policies.noise_space import NoiseSpace
from trimtab.rl.data.replay import Entries, entries_bytes
from trimtab.rl.runner import Encoded

PREFIX = "conditioning."


def _refusal(why: str, joined: str = "; ") -> UserError:
    return UserError("--rl.mode", f"{why}{joined}use --rl.mode=stored")


@dataclass(frozen=True)
class ConditioningSpec:
    """Shapes (without the batch dimension) and dtypes of the tensors in one observation's conditioning."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    @staticmethod
    def of(adapter: PolicyAdapter, conditioning: Encoded) -> ConditioningSpec:
        """Of what a policy made of an observation; a ``UserError`` says why that cannot be kept."""
        name = adapter.policy_type
        if adapter.remembers or isinstance(conditioning, list):
            raise _refusal(f"a {name} policy remembers its episode, which no replay holds")
        if adapter.policy is None:
            raise _refusal(f"a policy on a server ({name}) is not asked by the learner")
        if conditioning.lists or conditioning.repeats != 1:
            raise _refusal(f"a {name} policy is conditioned on more than tensors, which no replay holds")
        tensors = conditioning.tensors
        return ConditioningSpec(
            {key: tuple(value.shape[1:]) for key, value in tensors.items()},
            {key: value.dtype for key, value in tensors.items()},
        )

    @property
    def replayed(self) -> Entries:
        """The replay's entries: of the state, and of the one after it."""
        return {
            f"{before}{PREFIX}{name}": (shape, torch.float32)
            for before in ("", "next_")
            for name, shape in self.shapes.items()
        }

    def check_memory(self, capacity: int, limit_mib: float) -> None:
        """Raise a UserError where ``capacity`` transitions take more than ``limit_mib`` MiB in float32."""
        needed = capacity * entries_bytes(self.replayed) / 2**20
        if needed > limit_mib:
            raise _refusal(
                f"keeping the conditioning of {capacity} transitions takes {needed:,.0f} MiB, more than "
                f"--rl.conditioning_limit={limit_mib:g}; lower --train.replay_capacity, or",
                joined=" ",
            )

    def row(self, conditioning: Conditioning, i: int) -> dict[str, np.ndarray]:
        """That of observation ``i``, float32, as the replay keeps it; its shape must not change."""
        kept = {}
        for name, shape in self.shapes.items():
            value = conditioning.tensors[name][i]
            if tuple(value.shape) != shape:
                raise _refusal(f"the policy's conditioning changes its shape ('{name}': {shape})")
            kept[PREFIX + name] = value.float().cpu().numpy()
        return kept


class Decoder:
    """The frozen policy, asked by the learner: replayed conditioning and ``u`` -> chunks.

    ``u`` must tell the whole noise in its ``space``. ``calls`` counts how often the policy was asked.
    """

    def __init__(self, adapter: PolicyAdapter, space: NoiseSpace, spec: ConditioningSpec) -> None:
        self.adapter, self.space, self.spec = adapter, space, spec
        self.calls = 0

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor], u: Tensor, following: bool = False) -> Tensor:
        """Chunks (B, m, steps * action_dim) for ``u`` (B, m, dim), normalised, float32, where ``u`` is.

        With ``following``, those of the state after the transition, of a ``batch`` from the replay.
        """
        before = ("next_" if following else "") + PREFIX
        device = self.adapter.device
        tensors = {name: batch[before + name].to(device, dtype) for name, dtype in self.spec.dtypes.items()}
        flat = u.flatten(0, 1)
        prior = torch.zeros(len(flat), *self.adapter.noise_spec.shape, device=u.device)
        noise = self.space.expand(flat, prior).to(device, self.adapter.noise_spec.dtype)
        self.calls += 1
        chunks = self.adapter.denoise(Conditioning(tensors).repeat_interleave(u.shape[1]), noise)
        return chunks.to(u.device, torch.float32).flatten(1).unflatten(0, u.shape[:2])
