"""GR00T: LeRobot's own loader and select_action, precision, relative actions, instructions of two lengths."""

import json
from dataclasses import replace

import pytest
import torch
from lerobot.policies.groot.modeling_groot import GrootPolicy

from tests.helpers.adapter_cases import noise_like, with_injection
from tests.helpers.tiny import make_tiny
from trimtab.adapters import UserError, load_adapter
from trimtab.adapters.lerobot.injection import NoiseInjector
from trimtab.adapters.loading import open_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("groot") / "policy"


@pytest.fixture(scope="module")
def options(folder):
    return make_tiny("groot", folder, sidecars=True, cameras=2)


@pytest.fixture(scope="module")
def adapter(options):
    return load_adapter(options)


def seen(adapter, count=2, seed=3, **other):
    return {**adapter.example_observation(count, torch.Generator().manual_seed(seed)), **other}


def test_equals_the_policy_that_lerobot_loads(adapter, folder):
    policy = GrootPolicy.from_pretrained(folder)
    own = dict(adapter.policy.named_buffers())
    assert all(torch.equal(own[name], buffer) for name, buffer in policy.named_buffers())
    raw, noise = seen(adapter), noise_like(adapter, 2)
    batch = adapter.preprocess(raw)
    with NoiseInjector(noise) as injector:
        actions = torch.stack([policy.select_action(dict(batch)) for _ in range(adapter.chunk_shape[0])], 1)
        assert not policy._action_queue  # all that LeRobot executes of one chunk
    assert injector.hits == 1
    assert torch.equal(adapter.denoise(adapter.observe(raw), noise), actions)


def test_weights_keep_the_precision_that_lerobot_gives_them(tmp_path):
    options = make_tiny("groot", tmp_path, model_params_fp32=False)
    path = tmp_path / "gr00t" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    expected = {
        name: tensor.dtype for name, tensor in GrootPolicy.from_pretrained(tmp_path).state_dict().items()
    }
    state = open_adapter(options).policy.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == expected
    assert set(expected.values()) == {torch.bfloat16}


def test_a_backbone_that_says_bfloat16_is_float32_where_lerobot_makes_it_so(tmp_path):
    options = make_tiny("groot", tmp_path)
    path = tmp_path / "gr00t" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "load_bf16": True}))
    expected = GrootPolicy.from_pretrained(tmp_path).state_dict()
    state = open_adapter(options).policy.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_without_a_mask_instructions_of_two_lengths_are_refused(adapter, monkeypatch):
    monkeypatch.setattr(adapter.policy._groot_model.action_head.config, "use_alternate_vl_dit", False)
    adapter.encode(adapter.preprocess(seen(adapter, task=["push", "pull"])))
    with pytest.raises(
        UserError, match=r"--env.task: this groot policy attends to the padding of shorter instr"
    ):
        adapter.encode(adapter.preprocess(seen(adapter, task=["pick up the red cube", "push"])))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_bfloat16(tmp_path, dtype):
    options = make_tiny("groot", tmp_path, use_bf16=True)
    options.dtype = dtype
    adapter = load_adapter(options)
    raw, noise = seen(adapter), noise_like(adapter, 2)
    chunk = adapter.denoise(adapter.observe(raw), noise)
    expected = with_injection(adapter, adapter.preprocess(raw), noise)
    assert torch.equal(chunk, adapter.executed(expected))


def test_denoising_steps(options, adapter):
    raw, noise = seen(adapter), noise_like(adapter, 2)
    head = load_adapter(replace(options, num_inference_steps=2))
    assert head.policy._groot_model.action_head.num_inference_timesteps == 2
    assert not torch.equal(
        head.denoise(head.observe(raw), noise), adapter.denoise(adapter.observe(raw), noise)
    )


def test_a_missing_base_model_is_a_clear_error(options):
    with pytest.raises(UserError, match=r"--policy\.backbone.*config\.json"):
        load_adapter(replace(options, backbone="nowhere/at-all"))


def test_an_observation_does_not_depend_on_its_neighbours(adapter):
    tasks = ["pick up the red cube", "push", "pick up the red cube and push it to the goal", "push"]
    raw, noise = seen(adapter, 4, task=tasks), noise_like(adapter, 4)
    conditioning = adapter.observe(raw)
    together, features = adapter.denoise(conditioning, noise), adapter.features(conditioning)
    for row, task in enumerate(tasks):
        alone = {key: value[row : row + 1] for key, value in raw.items()}
        assert alone["task"] == [task]
        conditioning = adapter.observe(alone)
        expected = with_injection(adapter, adapter.preprocess(alone), noise[row : row + 1])
        assert torch.allclose(together[row : row + 1], adapter.executed(expected), atol=1e-5)
        assert torch.allclose(features[row : row + 1], adapter.features(conditioning), atol=1e-5)


def test_relative_actions_are_added_to_the_state_they_belong_to(tmp_path):
    adapter = load_adapter(make_tiny("groot", tmp_path, sidecars=True, relative=True, cameras=2))
    first = adapter.observe(seen(adapter))
    chunk = adapter.denoise(first, noise_like(adapter, 2))
    expected = adapter.postprocessor(chunk)  # LeRobot: with the state that was preprocessed last
    adapter.observe(seen(adapter, seed=4))
    assert not torch.allclose(adapter.postprocessor(chunk), expected)
    assert torch.equal(adapter.postprocess(chunk, first), expected)
    twice = adapter.postprocess(chunk.repeat_interleave(2, 0), first.repeat_interleave(2))
    assert torch.equal(twice, expected.repeat_interleave(2, 0))
