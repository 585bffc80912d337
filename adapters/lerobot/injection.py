"""Feed chosen noise to a policy that takes none: replace the one draw it makes, and prove that it did.

A ``TorchFunctionMode`` sees every factory call (``torch.randn`` and the like) of the thread while it is
active, so nothing is patched and nothing stays behind.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trimtab.adapters import Conditioning, PolicyAdapter

NORMAL_DRAWS = (torch.randn, torch.normal)


class NoiseInjector(TorchFunctionMode):
    """Returns ``noise``, one tensor per draw, from the first draws of its shape that ``functions`` make."""

    def __init__(
        self, noise: Tensor | Sequence[Tensor], functions: Sequence[Callable] = NORMAL_DRAWS
    ) -> None:
        super().__init__()
        self.noise = [noise] if isinstance(noise, Tensor) else list(noise)
        self.functions = set(functions)
        self.hits = 0  # draws replaced so far

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self.functions and self.hits < len(self.noise):
            noise = self.noise[self.hits]
            if out.shape == noise.shape:
                self.hits += 1
                return noise.to(out, copy=True)  # some policies write into what they drew
        return out

    def check(self, policy_type: str) -> None:
        """Raise ``RuntimeError`` where the policy drew less often than there was noise for."""
        if self.hits != len(self.noise):
            raise RuntimeError(
                f"{policy_type} drew its noise {self.hits} times where {len(self.noise)} were expected: "
                "this version of LeRobot samples differently from the one the adapter was written for"
            )


@contextmanager
def injected(
    adapter: PolicyAdapter, noise: Tensor | Sequence[Tensor], functions: Sequence[Callable] = NORMAL_DRAWS
) -> Iterator[None]:
    """Replace the policy's draws by ``noise``, as ``NoiseInjector``, and ``check`` that it made them."""
    with NoiseInjector(noise, functions) as injector:
        yield
    injector.check(adapter.policy_type)


class InjectedAdapter(PolicyAdapter):
    """Runs the policy's own public path with the noise injected, for policies whose prefix cannot be kept.

    ``encode`` only keeps the preprocessed batch. A subclass sets ``noise_spec`` and ``chunk_shape``.
    """

    draws: Sequence[Callable] = NORMAL_DRAWS
    recorded = ("denoise",)

    def encode(self, batch: dict[str, Any]) -> Conditioning:
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        lists = {key: value for key, value in batch.items() if isinstance(value, list)}
        lengths = {key: value.shape[0] if value.ndim else 0 for key, value in tensors.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"{self.policy_type}: the batch's tensors differ in their first dimension ({lengths}), so "
                "they cannot be kept by observation; write an `encode` of the policy's own"
            )
        return Conditioning(tensors, lists)

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        batch = {key: conditioning.rows(key) for key in (*conditioning.tensors, *conditioning.lists)}
        self.policy.reset()
        with injected(self, self.native_noise(noise), self.draws):
            chunk = self.policy.predict_action_chunk(batch)
        return self.executed(chunk)
