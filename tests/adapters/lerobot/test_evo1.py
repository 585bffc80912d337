"""Evo-1: LeRobot's own loader and queue, a backbone without weights, the uniform noise, precision."""

import dataclasses

import pytest
import torch
from lerobot.policies.evo1.modeling_evo1 import Evo1Policy

from tests.helpers.adapter_cases import noise_like
from tests.helpers.tiny import make_tiny
from trimtab.adapters import UserError, load_adapter
from trimtab.adapters.lerobot.injection import NoiseInjector


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return make_tiny("evo1", tmp_path_factory.mktemp("evo1") / "policy")


@pytest.fixture(scope="module")
def adapter(options):
    return load_adapter(options)


def example(adapter):
    return adapter.example_observation(2, torch.Generator().manual_seed(3))


def chunk_of(adapter):
    return adapter.denoise(adapter.observe(example(adapter)), noise_like(adapter, 2))


def test_equals_the_policy_that_lerobot_loads(adapter, options):
    """LeRobot reads the backbone's weights first; its queue hands out the steps that are executed."""
    policy = Evo1Policy.from_pretrained(options.path)
    batch = adapter.preprocess(example(adapter))
    with NoiseInjector((adapter.native_noise(noise_like(adapter, 2)) + 1) / 2, (torch.rand,)) as injector:
        steps = [policy.select_action(dict(batch)) for _ in range(adapter.chunk_shape[0])]
    assert injector.hits == 1
    assert (chunk_of(adapter) - torch.stack(steps, 1)).abs().max() <= 1e-6


def test_backbone_without_weights_is_enough(adapter, options, tmp_path):
    folder = make_tiny("evo1", tmp_path / "policy")
    (tmp_path / "policy" / "vlm" / "model.safetensors").unlink()
    assert torch.equal(chunk_of(load_adapter(folder)), chunk_of(adapter))


def test_noise_is_uniform(adapter):
    noise = adapter.native_noise(noise_like(adapter, 2000))
    assert noise.shape == (2000, adapter.noise_spec.size)
    assert noise.abs().max() <= 1
    deciles = torch.histc(noise, bins=10, min=-1, max=1) / noise.numel()
    assert (deciles - 0.1).abs().max() < 0.005
    assert adapter.noise_spec.distribution == "uniform"


def test_prompts_of_different_lengths(adapter):
    observation = example(adapter)
    observation["task"] = ["push the red cube to the goal", "push"]
    together = adapter.observe(observation)
    noise = noise_like(adapter, 2)
    alone = {
        key: value[1:2] if isinstance(value, torch.Tensor) else ["push"] for key, value in observation.items()
    }
    chunk = adapter.denoise(adapter.observe(alone), noise[1:2])
    assert (chunk[0] - adapter.denoise(together, noise)[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_precision(adapter, options, dtype):
    chunk = chunk_of(load_adapter(dataclasses.replace(options, dtype=dtype)))
    assert chunk.dtype == torch.float32
    assert 0 < (chunk - chunk_of(adapter)).abs().max() < 0.1


def test_wrong_options(options, tmp_path):
    with pytest.raises(UserError, match=r"name --policy.backbone"):
        load_adapter(dataclasses.replace(options, tokenizer=options.backbone))
    with pytest.raises(UserError, match=r"--policy.backbone: .* holds no config.json"):
        load_adapter(dataclasses.replace(options, backbone=str(tmp_path)))
