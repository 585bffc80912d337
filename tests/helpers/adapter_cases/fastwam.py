"""FastWAM: LeRobot draws one noise per sample and loops over the batch."""

from typing import Any

from torch import Tensor

from tests.helpers.adapter_cases import Case
from trimtab.adapters.lerobot.injection import NoiseInjector


def sample_by_sample(adapter: Any, batch: dict[str, Any], noise: Tensor) -> Tensor:
    """LeRobot's chunk of the whole batch, each sample's draw replaced by its own."""
    adapter.policy.reset()
    with NoiseInjector(noise.split(1)) as injector:
        chunk = adapter.policy.predict_action_chunk(dict(batch))
    injector.check("fastwam")
    return chunk


CASES = [Case("fastwam", sample_by_sample)]
