"""What loading proves on the real weights: the policy does what its adapter says, steered by noise alone."""

import torch
from torch import Tensor

from trimtab.adapters.base import NoiseToChunk
from trimtab.adapters.conditioning import Conditioning
from trimtab.adapters.errors import policy_error

BLIND = 1e-6  # effect of the noise, relative to the chunk, that is no more than rounding
INERT = 1e-3  # share of the noise's effect up to which what inert entries do counts as rounding
MIXED = 0.1  # share of the noise's effect by which a row of a batch may differ from the row alone


def verify(adapter: NoiseToChunk) -> None:
    """What ``PolicyAdapter.verify`` does."""
    kind, spec = adapter.policy_type, adapter.noise_spec
    if min(adapter.chunk_shape) < 1:
        raise policy_error(f"of each chunk it executes {adapter.chunk_shape[0]} actions; it must be 1")
    generator = torch.Generator().manual_seed(0)
    count = min(2, adapter.max_batch or 2)
    observation = adapter.example_observation(count, generator)
    conditioning = adapter.observe(observation)
    if conditioning.batch_size != count:
        raise policy_error(f"of {count} observations this {kind} policy made {conditioning.batch_size}")
    first, second = (
        torch.randn((count, *spec.shape), generator=generator).to(adapter.device, spec.dtype)
        for _ in range(2)
    )
    once = adapter.denoise(conditioning, first)
    check_produced(adapter, once, conditioning)
    effect = (once - adapter.denoise(conditioning, second)).abs().flatten(1).amax(1)
    rounding = adapter.rounding * effect.max()
    if not (once - adapter.denoise(conditioning, first)).abs().max() <= rounding:
        raise policy_error(
            f"the same noise gave two different chunks: this {kind} policy draws randomness while it samples "
            "and cannot be steered; save it with a deterministic sampler"
        )
    if not (once - adapter.denoise(adapter.observe(observation), first)).abs().max() <= rounding:
        raise policy_error(
            "the same observation, encoded twice, gave two different chunks: this "
            f"{kind} policy draws randomness while it looks and cannot be steered"
        )
    if effect.min() <= BLIND * once.abs().max():
        raise policy_error(
            f"two different noises gave the same chunk: this {kind} policy ignores its noise and cannot be "
            "steered"
        )
    if spec.live is not None:
        mixed = torch.where(spec.live.to(first.device), first, second)
        change = (once - adapter.denoise(conditioning, mixed)).abs().flatten(1).amax(1)
        if (change > INERT * effect).any():
            raise policy_error(
                f"noise entries that the {kind} adapter declares inert move its chunks by "
                f"{float(change.max()):.2g}, where all of the noise moves them by {float(effect.max()):.2g}"
            )
    for row in range(count if count > 1 else 0):
        here = conditioning[row]
        alone = adapter.denoise(here, first[row : row + 1])
        check_produced(adapter, alone, here)
        if (alone[0] - once[row]).abs().max() > MIXED * effect[row]:
            raise RuntimeError(
                f"the {kind} adapter mixes the rows of a batch: a chunk depends on the noise or the "
                "observation beside it"
            )


def check_produced(adapter: NoiseToChunk, chunk: Tensor, conditioning: Conditioning) -> None:
    """Refuse a chunk, actions or features of another shape than the adapter declares, or not finite."""
    rows, kind = conditioning.batch_size, adapter.policy_type
    declared = (rows, *adapter.chunk_shape)
    if tuple(chunk.shape) != declared:
        raise policy_error(
            f"the {kind} policy makes chunks of shape {tuple(chunk.shape)}, its adapter and config.json "
            f"declare {declared} (rows, executed steps, action dimension)"
        )
    if not chunk.is_floating_point() or not torch.isfinite(chunk).all():
        raise policy_error("the policy turns ordinary noise into NaN or Inf; its weights are broken")
    actions = torch.as_tensor(adapter.postprocess(chunk, conditioning))
    action = (adapter.config.output_features or {}).get("action")
    expected = (rows, adapter.chunk_shape[0], *(action.shape if action else actions.shape[2:]))
    if tuple(actions.shape) != expected:
        raise policy_error(
            f"its postprocessor makes actions of shape {tuple(actions.shape)}, config.json declares "
            f"{expected} (rows, executed steps, action dimension)"
        )
    turned = actions if adapter.relative_actions else adapter.postprocess(chunk.flip(1), conditioning).flip(1)
    if not torch.allclose(turned, actions, 1e-4, 1e-5, equal_nan=True):
        raise policy_error(
            "its postprocessor gives an action another value after other actions: it remembers (it smooths, "
            "say), and no chunk can be known before it is executed; take that step out of the postprocessor"
        )
    if not torch.isfinite(actions).all():
        raise policy_error("its postprocessor turns chunks into NaN or Inf; its statistics are broken")
    features = adapter.features(conditioning)
    adapter.offers_features = features is not None
    if features is not None and (features.ndim != 2 or len(features) != rows):
        raise policy_error(
            f"the {kind} adapter's features have shape {tuple(features.shape)}, not ({rows}, d)"
        )
    if features is not None and not torch.isfinite(features).all():
        raise policy_error("the policy's features are NaN or Inf; its weights are broken")
