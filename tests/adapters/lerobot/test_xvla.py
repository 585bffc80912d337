"""X-VLA: older checkpoints, LIBERO's postprocessor, precision, LeRobot's queue."""

import dataclasses

import pytest
import torch
from lerobot.policies.xvla.processor_xvla import XVLARotation6DToAxisAngleProcessorStep
from safetensors.torch import load_file, save_file

from tests.helpers.adapter_cases import noise_like
from tests.helpers.tiny import make_tiny
from trimtab.adapters import UserError, load_adapter
from trimtab.adapters.checkpoint.files import WEIGHTS
from trimtab.adapters.lerobot.injection import NoiseInjector


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return make_tiny("xvla", tmp_path_factory.mktemp("xvla") / "policy", action_mode="ee6d")


def chunk_of(adapter, seed=3):
    conditioning = adapter.observe(adapter.example_observation(2, torch.Generator().manual_seed(seed)))
    return adapter.denoise(conditioning, noise_like(adapter, 2))


def test_equals_select_action_with_its_queue(options):
    adapter = load_adapter(options)
    batch = adapter.preprocess(adapter.example_observation(2, torch.Generator().manual_seed(3)))
    adapter.policy.reset()
    with NoiseInjector(noise_like(adapter, 2)) as injector:
        steps = [adapter.policy.select_action(dict(batch)) for _ in range(adapter.chunk_shape[0])]
    assert injector.hits == 1
    assert (chunk_of(adapter) - torch.stack(steps, 1)).abs().max() <= 1e-5


def test_instructions_padded_to_the_longest_are_of_one_length(tmp_path):
    adapter = load_adapter(make_tiny("xvla", tmp_path, pad_language_to="longest"))
    raw = adapter.example_observation(2, torch.Generator().manual_seed(3))
    adapter.observe(raw | {"task": ["push it", "pull it"]})
    with pytest.raises(
        UserError, match=r"--env.task: this xvla policy attends to the padding of shorter instru"
    ):
        adapter.observe(raw | {"task": ["pick up the red cube and push it to the goal", "push"]})


def test_postprocessor_that_takes_single_steps(options):
    """The step of LIBERO checkpoints indexes (B, action_dim): a whole chunk would lose its time axis."""
    adapter = load_adapter(options)
    adapter.postprocessor.steps.insert(1, XVLARotation6DToAxisAngleProcessorStep())
    chunk = chunk_of(adapter)
    actions = adapter.postprocess(chunk)
    assert actions.shape == (2, adapter.chunk_shape[0], 7)
    for step in range(chunk.shape[1]):
        assert torch.allclose(actions[:, step], adapter.postprocessor(chunk[:, step]))


def test_checkpoint_of_the_older_layout(options, tmp_path):
    expected = chunk_of(load_adapter(options))
    older = make_tiny("xvla", tmp_path / "older", action_mode="ee6d")
    weights = load_file(tmp_path / "older" / WEIGHTS)
    projection = weights.pop("model.vlm.multi_modal_projector.image_projection.weight")
    weights["model.vlm.image_projection"] = projection.T.contiguous()
    language = "model.vlm.language_model."
    weights = {name.replace(language, f"{language}model."): tensor for name, tensor in weights.items()}
    weights[f"{language}final_logits_bias"] = torch.zeros(1)
    save_file(weights, tmp_path / "older" / WEIGHTS)
    assert torch.equal(chunk_of(load_adapter(older)), expected)


def test_precision(options):
    expected = chunk_of(load_adapter(options))
    chunk = chunk_of(load_adapter(dataclasses.replace(options, dtype="bfloat16")))
    assert chunk.dtype == torch.float32  # LIBERO's postprocessor cannot take bfloat16
    assert 0 < (chunk - expected).abs().max() < 0.1
    with pytest.raises(UserError, match="float32 or bfloat16"):
        load_adapter(dataclasses.replace(options, dtype="float16"))


def test_number_of_steps(options):
    adapter = load_adapter(dataclasses.replace(options, num_inference_steps=1))
    assert adapter.config.num_denoising_steps == 1
    assert not torch.equal(chunk_of(adapter), chunk_of(load_adapter(options)))
