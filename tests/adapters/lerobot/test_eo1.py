"""What EO-1 has of its own; the rest is in test_every_adapter.py."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from tests.helpers.adapter_cases import noise_like, with_injection
from tests.helpers.fuzz import limited_memory
from tests.helpers.tiny import make_tiny
from trimtab.adapters import UserError, load_adapter
from trimtab.adapters.checkpoint import weights
from trimtab.adapters.lerobot.injection import NoiseInjector


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return make_tiny("eo1", tmp_path_factory.mktemp("eo1") / "policy")


@pytest.fixture(scope="module")
def adapter(options):
    return load_adapter(options)


@pytest.fixture
def observation(adapter):
    """Of two tasks of different length: the shorter prompt is padded on its left."""
    observation = adapter.example_observation(2, torch.Generator().manual_seed(3))
    return {**observation, "task": ["pick up the red cube", "press the button"]}


def test_prompts_of_different_length(adapter, observation):
    batch, noise = adapter.preprocess(observation), noise_like(adapter, 2)
    assert not batch["attention_mask"].all()
    conditioning = adapter.encode(batch)
    chunk = adapter.denoise(conditioning, noise)
    expected = adapter.executed(with_injection(adapter, batch, noise))
    assert (chunk - expected).abs().max() <= 1e-5
    alone = {key: value[1:] for key, value in observation.items()}
    assert (adapter.denoise(adapter.observe(alone), noise[1:]) - chunk[1:]).abs().max() <= 1e-5
    assert (adapter.features(adapter.observe(alone)) - adapter.features(conditioning)[1:]).abs().max() <= 1e-5


def test_executes_what_select_action_executes(adapter, observation):
    batch, noise = adapter.preprocess(observation), noise_like(adapter, 2)
    adapter.policy.reset()
    with NoiseInjector(noise) as injector:
        actions = [adapter.policy.select_action(dict(batch)) for _ in range(adapter.chunk_shape[0])]
    assert injector.hits == 1
    assert torch.allclose(adapter.denoise(adapter.encode(batch), noise), torch.stack(actions, 1), atol=1e-5)


def test_task_and_state_matter(adapter, observation):
    noise = noise_like(adapter, 2)
    chunk = adapter.denoise(adapter.observe(observation), noise)
    moved = {**observation, "observation.state": observation["observation.state"] + 0.2}
    swapped = {**observation, "task": observation["task"][::-1]}
    for other in (moved, swapped):
        assert not torch.allclose(chunk, adapter.denoise(adapter.observe(other), noise))


def test_broken_prompt_is_refused(adapter, observation):
    batch = adapter.preprocess(observation)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == batch["action_token_id"], 1)
    with pytest.raises(ValueError, match="one span of 6 action tokens"):
        adapter.encode(batch)


def test_bfloat16_and_number_of_steps(adapter, options, observation):
    noise = noise_like(adapter, 2)
    exact = adapter.denoise(adapter.observe(observation), noise)
    rough = load_adapter(type(options)(**{**vars(options), "dtype": "bfloat16"}))
    near = rough.denoise(rough.observe(observation), noise)
    assert near.dtype == torch.float32
    assert 0 < (exact - near).abs().max() < 0.05 * exact.abs().max()
    public = rough.executed(with_injection(rough, rough.preprocess(observation), noise))
    assert torch.allclose(near, public, atol=1e-5)
    few = load_adapter(type(options)(**{**vars(options), "num_inference_steps": 2}))
    assert not torch.allclose(few.denoise(few.observe(observation), noise), exact)


def test_moved_folder(adapter, options, observation, tmp_path):
    """The saved processor names the folder in which its backbone lay."""
    import shutil

    folder = tmp_path / "moved"
    shutil.copytree(options.path, folder)
    again = load_adapter(type(options)(path=str(folder), device="cpu", backbone=str(folder / "qwen")))
    noise = noise_like(adapter, 2)
    assert torch.equal(
        again.denoise(again.observe(observation), noise), adapter.denoise(adapter.observe(observation), noise)
    )


def test_a_config_of_a_far_larger_model_is_refused_before_it_takes_the_memory(options, tmp_path, monkeypatch):
    """An empty vlm_config stands for a Qwen2.5-VL of eight billion parameters."""
    monkeypatch.setattr(weights, "BESIDES", 10**7)
    folder = tmp_path / "policy"
    shutil.copytree(options.path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vlm_config": {}}))
    with limited_memory(), pytest.raises(UserError, match=r"far more .* config that is missing or empty"):
        load_adapter(replace(options, path=str(folder)))
