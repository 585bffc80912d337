"""What ACT has of its own: a latent that LeRobot sets to zero, and modes in which it decides nothing."""

import pytest
import torch

from tests.helpers.adapter_cases import noise_like
from tests.helpers.tiny import make_tiny
from trimtab.adapters import UserError, load_adapter


@pytest.fixture(scope="module", params=[{}, {"cameras": 2}, {"cameras": 0, "env_dim": 7}], ids=str)
def adapter(request, tmp_path_factory):
    return load_adapter(make_tiny("act", tmp_path_factory.mktemp("act") / "policy", **request.param))


@pytest.fixture(scope="module")
def observation(adapter):
    return adapter.example_observation(2, torch.Generator().manual_seed(3))


def test_zero_noise_is_lerobots_own_policy(adapter, observation):
    zeros = torch.zeros(2, *adapter.noise_spec.shape)
    chunk = adapter.denoise(adapter.observe(observation), zeros)
    batch = adapter.preprocess(observation)
    assert torch.equal(chunk, adapter.policy.predict_action_chunk(dict(batch))[:, : chunk.shape[1]])
    adapter.policy.reset()
    executed = [adapter.policy.select_action(dict(batch)) for _ in range(chunk.shape[1])]
    assert torch.equal(chunk, torch.stack(executed, 1))
    assert adapter.noise_spec.distribution == "zero"


def test_encoding_leaves_nothing_behind(adapter, observation):
    adapter.observe(observation)
    assert not any(module._forward_hooks for module in adapter.policy.modules())


def test_images_are_seen_once_for_many_noises(adapter, observation):
    if not adapter.config.image_features:
        pytest.skip("no camera")
    calls = []
    handle = adapter.policy.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    conditioning = adapter.observe(observation)
    for _ in range(3):
        adapter.denoise(conditioning.repeat_interleave(4), noise_like(adapter, 8))
    handle.remove()
    assert len(calls) == len(adapter.config.image_features)


REFUSED = {
    "no VAE": ({"use_vae": False}, {}, r"--policy.path: .* \(use_vae=false\): it has no latent"),
    "ensembling": (
        {"temporal_ensemble_coeff": 0.01, "n_action_steps": 1},
        {},
        r"--policy.path: .*temporal_ensemble_coeff=0.01.*set temporal_ensemble_coeff to null .*at most 8",
    ),
    "steps": ({}, {"num_inference_steps": 5}, r"--policy.num_inference_steps: .* one step"),
    "half precision": ({}, {"dtype": "bfloat16"}, r"--policy.dtype: this act policy runs in float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name, tmp_path):
    fields, asked, message = REFUSED[name]
    options = make_tiny("act", tmp_path / "policy", cameras=0, env_dim=7, **fields)
    for key, value in asked.items():
        setattr(options, key, value)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(options)
    assert "\n" not in str(caught.value)
