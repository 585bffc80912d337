"""What MolmoAct2 has of its own: modes, precision, and a backbone without its weights."""

import json
from copy import copy

import pytest
import torch

from tests.helpers.adapter_cases import noise_like, with_injection
from tests.helpers.tiny import make_tiny
from trimtab.adapters import UserError, load_adapter


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return make_tiny("molmoact2", tmp_path_factory.mktemp("molmoact2") / "policy", model_dtype="bfloat16")


@pytest.fixture(scope="module")
def adapter(options):
    return load_adapter(options)


@pytest.fixture(scope="module")
def observation(adapter):
    return adapter.example_observation(2, torch.Generator().manual_seed(3))


def test_half_precision_equals_the_public_path(adapter, observation):
    conditioning, noise = adapter.observe(observation), noise_like(adapter, 2)
    chunk = adapter.denoise(conditioning, noise)
    assert chunk.dtype == torch.float32 and adapter.expert.action_embed.weight.dtype == torch.bfloat16
    expected = with_injection(adapter, adapter.preprocess(observation), noise)
    assert torch.equal(chunk, adapter.executed(expected))


def test_equals_a_policy_that_lerobot_loaded_from_the_backbone(adapter, observation, tmp_path):
    from lerobot.policies.molmoact2.modeling_molmoact2 import MolmoAct2Policy

    backbone = tmp_path / "backbone"
    adapter.policy.model.save_pretrained(backbone)
    config = copy(adapter.config)
    config.checkpoint_path = str(backbone)
    policy = MolmoAct2Policy(config).eval()
    batch, noise = adapter.preprocess(observation), noise_like(adapter, 2)
    expected = with_injection(type("Loaded", (), {"policy": policy}), batch, noise)
    chunk = adapter.denoise(adapter.encode(batch), noise)
    assert torch.equal(chunk, adapter.executed(expected))


def test_select_action_pops_the_executed_steps(adapter, observation):
    from trimtab.adapters.lerobot.injection import NoiseInjector

    batch, noise = adapter.preprocess(observation), noise_like(adapter, 2)
    chunk = adapter.denoise(adapter.encode(batch), noise)
    adapter.policy.reset()
    with NoiseInjector(noise) as injector:
        for step in range(adapter.chunk_shape[0]):
            assert torch.equal(adapter.policy.select_action(dict(batch)), chunk[:, step])
    assert injector.hits == 1


def test_each_kind_of_input_matters(adapter, observation):
    noise = noise_like(adapter, 2)
    chunk = adapter.denoise(adapter.observe(observation), noise)
    others = {
        "observation.image": 1 - observation["observation.image"],
        "observation.state": -observation["observation.state"],
        "task": ["close the drawer"] * 2,
    }
    for key, value in others.items():
        changed = adapter.denoise(adapter.observe({**observation, key: value}), noise)
        assert not torch.equal(chunk, changed), key


def test_precision_and_steps_can_be_chosen(options):
    options = type(options)(**{**vars(options), "dtype": "float32", "num_inference_steps": 2})
    adapter = load_adapter(options)
    assert {p.dtype for p in adapter.policy.parameters()} == {torch.float32}
    assert adapter.config.model_dtype == "float32" and adapter.config.num_inference_steps == 2


def test_without_a_saved_mode_noise_is_used(tmp_path):
    options = make_tiny("molmoact2", tmp_path / "policy", inference_action_mode=None)
    assert load_adapter(options).config.inference_action_mode == "continuous"


@pytest.mark.parametrize("field", ["inference_action_mode", "action_mode"])
def test_tokens_cannot_be_steered(tmp_path, field):
    options = make_tiny("molmoact2", tmp_path / "policy")
    edit_config(tmp_path / "policy", **{"inference_action_mode": None, field: "discrete"})
    with pytest.raises(UserError, match=r"action tokens .*'continuous'"):
        load_adapter(options)


def test_a_backbone_out_of_reach_is_named(tmp_path):
    options = make_tiny("molmoact2", tmp_path / "policy")
    options = type(options)(**{**vars(options), "backbone": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match=r"--policy.backbone: there is no folder .*nowhere"):
        load_adapter(options)
