"""What most vision-language-action policies have in common, such as a key-value cache of the prefix.

Any number of noises read the cache of an observation's prefix, and none changes it.
"""

import abc
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from lerobot.policies.common.flow_matching import euler_integrate
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from trimtab.adapters import Conditioning, NoiseSpec, PolicyAdapter, UserError
from trimtab.adapters.conditioning import repeat_rows
from trimtab.adapters.lerobot.inversion import Velocity, reverse_euler


class VLAAdapter(PolicyAdapter):
    """A policy that reads a task, resizes its images and denoises a chunk of ``n_action_steps`` or more."""

    reads_task = True
    resizes_images = True
    noise_fields: ClassVar[tuple[str, str]] = ("chunk_size", "max_action_dim")  # hold the shape of its noise

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        super().__init__(policy, preprocessor, postprocessor)
        config = policy.config
        self.noise_spec = NoiseSpec(tuple(getattr(config, name) for name in self.noise_fields))
        self.chunk_shape = (config.n_action_steps, config.action_feature.shape[0])


def refuse_lengths(kind: str, mask: Tensor) -> None:
    """Raise a ``UserError`` for instructions of several lengths, where the policy attends to their padding.

    ``mask`` is (B, tokens). What an observation gives would depend on the instructions beside it.
    """
    if len(lengths := mask.sum(1).unique()) > 1:
        raise UserError(
            "--env.task",
            f"this {kind} policy attends to the padding of shorter instructions; those of these tasks are "
            f"{', '.join(map(str, lengths.int().tolist()))} tokens long; name one task",
        )


class FlowAdapter(VLAAdapter):
    """Integrates a velocity by ``steps_field`` Euler steps, from noise at time 1 to the chunk at time 0."""

    steps_field: ClassVar[str]
    inverts = True

    @abc.abstractmethod
    def velocity(self, conditioning: Conditioning) -> Velocity:
        """The flow of B chunks."""

    def _integrate(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        return euler_integrate(self.velocity(conditioning), noise, getattr(self.config, self.steps_field))

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        return self.executed(self._integrate(conditioning, noise)).float()

    def reverse(self, conditioning: Conditioning, chunk: Tensor, iterations: int) -> Tensor:
        whole = self._integrate(conditioning, chunk.new_zeros(len(chunk), *self.noise_spec.shape))
        self.executed(whole).copy_(chunk)
        steps = getattr(self.config, self.steps_field)
        return reverse_euler(self.velocity(conditioning), whole, steps, iterations)


class PrefixLayer(DynamicLayer):
    """One layer's prefix, (N, heads, length, dim); each row serves ``repeats`` noises.

    ``update`` returns prefix and new entries together and stores nothing: no step has to copy or crop the
    cache, and of the rows for K noises only one layer's exist at a time.
    """

    def __init__(self, keys: Tensor, values: Tensor, repeats: int) -> None:
        self._keys, self._values, self.repeats = keys, values, repeats
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    @property
    def keys(self) -> Tensor:
        """(N * repeats, heads, length, dim)"""
        return repeat_rows(self._keys, self.repeats)

    @property
    def values(self) -> Tensor:
        return repeat_rows(self._values, self.repeats)

    def __getitem__(self, index: int) -> Tensor:  # for models that keep pairs of keys and values
        return repeat_rows((self._keys, self._values)[index], self.repeats)

    def get_seq_length(self) -> int:
        return self._keys.shape[-2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple:
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)

    def crop(self, max_length: int) -> None:
        """Nothing was added, so nothing is to be removed."""


def store_layers(layers: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Keys and values of each layer as named tensors of a ``Conditioning``."""
    tensors = {}
    for index, (keys, values) in enumerate(layers):
        tensors[f"keys.{index}"], tensors[f"values.{index}"] = keys, values
    return tensors


def store_prefix(cache: Cache) -> dict[str, Tensor]:
    """A filled cache as named tensors of a ``Conditioning``."""
    return store_layers((layer.keys, layer.values) for layer in cache.layers)


def restore_prefix(conditioning: Conditioning) -> Cache:
    """The cache that ``store_prefix`` wrote, for ``conditioning.batch_size`` noises."""
    tensors = conditioning.tensors
    layers: list[PrefixLayer] = []
    while (name := f"keys.{len(layers)}") in tensors:
        values = tensors[name.replace("keys", "values")]
        layers.append(PrefixLayer(tensors[name], values, conditioning.repeats))
    return Cache(layers=layers)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, length, dim) over the entries where ``mask`` (B, length) is true, as float32."""
    weight = mask.to(torch.float32).unsqueeze(-1)
    return (hidden.float() * weight).sum(1) / weight.sum(1).clamp_min(1.0)
