"""VLA-JEPA: LeRobot's own loader and select_action, its precision, what is left out and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from lerobot.policies.vla_jepa.modeling_vla_jepa import VLAJEPAPolicy

from tests.helpers.adapter_cases import noise_like
from tests.helpers.tiny import make_tiny
from trimtab.adapters import UserError, load_adapter
from trimtab.adapters.lerobot.injection import NoiseInjector


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vla_jepa") / "policy"


@pytest.fixture(scope="module")
def options(folder):
    return make_tiny("vla_jepa", folder, enable_world_model=True)


@pytest.fixture(scope="module")
def adapter(options):
    return load_adapter(options)


def seen(adapter, count=2, seed=3, **other):
    return {**adapter.example_observation(count, torch.Generator().manual_seed(seed)), **other}


def test_equals_the_policy_that_lerobot_loads_with_its_world_model(adapter, folder):
    policy = VLAJEPAPolicy.from_pretrained(folder)
    assert policy.model.video_encoder is not None and adapter.policy.model.video_encoder is None
    assert any("world model" in note for note in adapter.notes)
    raw, noise = seen(adapter), noise_like(adapter, 2)
    batch = adapter.preprocess(raw)
    with NoiseInjector(noise) as injector:
        actions = torch.stack([policy.select_action(dict(batch)) for _ in range(adapter.chunk_shape[0])], 1)
        assert not policy._queues["action"]  # all that LeRobot executes of one chunk
    assert injector.hits == 1
    assert torch.equal(adapter.denoise(adapter.observe(raw), noise), actions)


def test_a_contradicting_tubelet_size_is_refused(options, tmp_path):
    make_tiny("vla_jepa", tmp_path, enable_world_model=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "jepa_tubelet_size": 4}))
    with pytest.raises(UserError, match="jepa_tubelet_size 4, the saved video encoder takes 2"):
        load_adapter(replace(options, path=str(tmp_path)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_precisions(options, adapter, dtype):
    other = load_adapter(replace(options, dtype=dtype))
    assert {p.dtype for p in other.policy.parameters()} == {getattr(torch, dtype)}
    raw, noise = seen(adapter), noise_like(adapter, 2)
    chunk = other.denoise(other.observe(raw), noise)
    assert chunk.dtype == torch.float32
    assert torch.allclose(chunk, adapter.denoise(adapter.observe(raw), noise), atol=0.1)


def test_qwens_weights_are_not_needed(options, adapter, folder):
    weights = folder / "qwen" / "model.safetensors"
    hidden = weights.rename(weights.with_suffix(".hidden"))
    try:
        again = load_adapter(options)
    finally:
        hidden.rename(weights)
    raw, noise = seen(adapter), noise_like(adapter, 2)
    chunk = again.denoise(again.observe(raw), noise)
    assert torch.equal(chunk, adapter.denoise(adapter.observe(raw), noise))
    assert again.config.qwen_model_name == options.backbone


def test_missing_backbone_and_tokenizer_are_clear_errors(options):
    with pytest.raises(UserError, match=r"--policy\.backbone"):
        load_adapter(replace(options, backbone="nowhere/at-all"))
    with pytest.raises(UserError, match=r"--policy\.tokenizer.*--policy\.backbone"):
        load_adapter(replace(options, tokenizer="somewhere"))


def test_instructions_of_two_lengths(adapter):
    tasks = ["pick up the red cube", "push"]
    raw, noise = seen(adapter, task=tasks), noise_like(adapter, 2)
    together = adapter.denoise(adapter.observe(raw), noise)
    for row in range(2):
        alone = adapter.observe({key: value[row : row + 1] for key, value in raw.items()})
        # Qwen3-VL runs in bfloat16, also on the CPU.
        assert torch.allclose(together[row], adapter.denoise(alone, noise[row : row + 1])[0], atol=5e-3)
    raw["task"] = [tasks[1], tasks[1]]
    assert not torch.allclose(adapter.denoise(adapter.observe(raw), noise)[0], together[0], atol=1e-4)
