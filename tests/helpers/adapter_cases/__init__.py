"""One case per policy type for the shared adapter tests: a tiny instance, and LeRobot's own path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.adapters.lerobot.injection import NORMAL_DRAWS, NoiseInjector


def with_injection(adapter: Any, batch: dict[str, Any], noise: Tensor, draws: Any = NORMAL_DRAWS) -> Tensor:
    """The policy's public chunk, its draw replaced."""
    adapter.policy.reset()
    with NoiseInjector(noise, draws) as injector:
        chunk = adapter.policy.predict_action_chunk(dict(batch))
    assert injector.hits == 1
    return chunk


def with_argument(adapter: Any, batch: dict[str, Any], noise: Tensor) -> Tensor:
    """The policy's public chunk, the noise given as LeRobot's argument."""
    adapter.policy.reset()
    return adapter.policy.predict_action_chunk(dict(batch), noise=noise)


@dataclass
class Case:
    """How to test one adapter.

    Attributes:
        type: LeRobot's policy type.
        public: (adapter, preprocessed batch, native noise) -> LeRobot's chunk, at least as long as executed.
        fields: fields of the tiny instance's config that differ, to test a variant.
        inert: number of inert noise entries that the adapter must report.
        shares_prefix: whether K noises share one encoding.
    """

    type: str
    public: Callable[[Any, dict[str, Any], Tensor], Tensor] = with_injection
    fields: dict[str, Any] = field(default_factory=dict)
    inert: int = 0
    shares_prefix: bool = True

    @property
    def id(self) -> str:
        return "-".join([self.type, *(f"{k}={v}" for k, v in self.fields.items())])


def noise_like(adapter: Any, count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, *adapter.noise_spec.shape), generator=generator).to(adapter.noise_spec.dtype)


def all_cases() -> list[Case]:
    """The cases of every file in this folder."""
    found = []
    for module in sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py")):
        found += import_module(f"tests.helpers.adapter_cases.{module}").CASES
    return found
