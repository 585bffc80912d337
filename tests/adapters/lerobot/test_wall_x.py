"""What Wall-X has of its own: the split of its one model, its mixed precision, a backbone without weights."""

import json
import shutil
from copy import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.adapter_cases import noise_like, with_injection
from tests.helpers.adapter_cases.wall_x import in_float32
from tests.helpers.tiny import make_tiny
from trimtab.adapters import UserError, load_adapter
from trimtab.adapters.lerobot.injection import NoiseInjector


def tiny(folder, **fields):
    return load_adapter(make_tiny("wall_x", folder / "policy", **fields))


def observe(adapter):
    observation = adapter.example_observation(3, torch.Generator().manual_seed(3))
    observation["task"] = ["pick up the red cube", "push", "close the drawer"]
    return observation


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("wall_x"), dtype=None)


@pytest.mark.parametrize("side", ["left", "right"])
def test_tasks_of_different_lengths(tmp_path, side):
    adapter = tiny(tmp_path, padding_side=side)
    observation, noise = observe(adapter), noise_like(adapter, 3)
    chunk = adapter.denoise(adapter.observe(observation), noise)
    expected = adapter.executed(in_float32(adapter, adapter.preprocess(observation), noise))
    assert (chunk - expected).abs().max() <= 1e-5
    for row in range(3):  # padding changes nothing
        alone = adapter.observe({key: value[row : row + 1] for key, value in observation.items()})
        assert (chunk[row] - adapter.denoise(alone, noise[row : row + 1])[0]).abs().max() <= 1e-4


def test_lerobots_own_precision(adapter):
    dtypes = {p.dtype for p in adapter.policy.parameters()}
    assert dtypes == {torch.bfloat16, torch.float32}
    batch, noise = adapter.preprocess(observe(adapter)), noise_like(adapter, 3)
    chunk = adapter.denoise(adapter.encode(batch), noise)
    expected = adapter.executed(with_injection(adapter, batch, noise))
    assert chunk.dtype == torch.float32
    assert (chunk - expected).norm() <= 0.02 * expected.norm()  # bfloat16 may round another way


def test_equals_a_policy_that_lerobot_loaded_from_the_backbone(adapter, tmp_path):
    from lerobot.policies.wall_x.modeling_wall_x import WallXPolicy

    for file in Path(adapter.config.pretrained_name_or_path).iterdir():
        shutil.copy(file, tmp_path)
    save_file(adapter.policy.model.state_dict(), tmp_path / "model.safetensors")
    config = copy(adapter.config)
    config.pretrained_name_or_path = str(tmp_path)
    policy = WallXPolicy(config).eval()
    batch, noise = adapter.preprocess(observe(adapter)), noise_like(adapter, 3)
    expected = with_injection(type("Loaded", (), {"policy": policy}), batch, noise)
    assert torch.equal(with_injection(adapter, batch, noise), expected)


def test_select_action_pops_the_executed_steps(adapter):
    batch, noise = adapter.preprocess(observe(adapter)), noise_like(adapter, 3)
    chunk = adapter.denoise(adapter.encode(batch), noise)
    adapter.policy.reset()
    with NoiseInjector(noise) as injector:
        for step in range(adapter.chunk_shape[0]):
            action = adapter.policy.select_action(dict(batch))
            assert (action - chunk[:, step]).norm() <= 0.02 * action.norm()
    assert injector.hits == 1


def test_each_kind_of_input_matters(adapter):
    observation, noise = observe(adapter), noise_like(adapter, 3)
    chunk = adapter.denoise(adapter.observe(observation), noise)
    others = {
        "observation.image": 1 - observation["observation.image"],
        "observation.state": -observation["observation.state"],
        "task": ["press the button"] * 3,
    }
    for key, value in others.items():
        changed = adapter.denoise(adapter.observe({**observation, key: value}), noise)
        assert not torch.allclose(chunk, changed, rtol=1e-3), key


def test_number_of_steps(adapter, tmp_path):
    options = make_tiny("wall_x", tmp_path / "policy", dtype=None)
    fewer = load_adapter(type(options)(**{**vars(options), "num_inference_steps": 2}))
    batch, noise = adapter.preprocess(observe(adapter)), noise_like(adapter, 3)
    inputs = fewer.policy.preprocess_inputs(batch)
    with NoiseInjector(noise):
        output = fewer.policy.model.predict(
            "diffusion", pred_horizon=6, action_dim=6, num_inference_timesteps=2, **inputs
        )
    chunk, expected = fewer.denoise(fewer.encode(batch), noise), fewer.executed(output["predict_action"])
    assert (chunk - expected).norm() <= 0.02 * expected.norm()
    assert not torch.allclose(chunk, adapter.denoise(adapter.encode(batch), noise))


def test_tokens_cannot_be_steered(tmp_path):
    options = make_tiny("wall_x", tmp_path / "policy")
    path = tmp_path / "policy" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_mode": "fast"}))
    with pytest.raises(UserError, match=r"action tokens \(prediction_mode 'fast'\)"):
        load_adapter(options)
