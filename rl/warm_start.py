"""``--train.warm_start``: a noise actor that begins at a known constant noise."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from trimtab.adapters import NoiseSpec, UserError
from trimtab.adapters.checkpoint.files import WEIGHTS, read_weights
from trimtab.adapters.checkpoint.weights import load_weights
from trimtab.policies.actor import NoiseActor
from trimtab.policies.artefact import is_artefact, read_config

OPTION = "--train.warm_start"


def read_constant(name: str, spec: NoiseSpec) -> Tensor:
    """A constant noise (*spec.shape), float32.

    Args:
        name: the artefact of a run in a ``constant`` noise space, such as ``golden_ticket``'s, or the
            ``best_constant.safetensors`` of ``trimtab probe``.
        spec: the noise of the policy to be steered.

    Raises:
        UserError: neither of the two, or of another policy's shape.
    """
    path = Path(name).expanduser()
    saved = read_config(path) if is_artefact(name) else None
    if saved is None and not path.is_file():
        raise UserError(OPTION, f"{path} is neither an artefact's folder nor a safetensors file")
    tensors = read_weights(path / WEIGHTS if saved else path, OPTION)
    if saved is None and "noise" not in tensors:
        raise UserError(OPTION, f"{path} holds no 'noise'; give best_constant.safetensors of a probe")
    shape = tuple(saved.noise_shape if saved else tensors["noise"].shape)
    if shape != tuple(spec.shape):
        raise UserError(OPTION, f"{path} holds noise of shape {shape}, this policy takes {tuple(spec.shape)}")
    if saved is None:
        return tensors["noise"].float()
    space = saved.noise.build(replace(spec, dtype=torch.float32))
    if space.uses_features:
        raise UserError(OPTION, f"{path} chooses its noise by the observation; name one of constant noise")
    actor = NoiseActor(saved.feature_dim, space, saved.actor, saved.observe)
    load_weights(actor, tensors, path / WEIGHTS)
    prior = torch.zeros(1, *spec.shape)
    return actor.eval().act(prior.flatten(1), prior, deterministic=True)[0]
