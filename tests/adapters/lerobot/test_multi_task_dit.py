"""What multi_task_dit has of its own: CLIP without a download, language, a history, two objectives."""

import pytest
import torch

from tests.helpers.adapter_cases import noise_like
from tests.helpers.adapter_cases.multi_task_dit import stepwise
from tests.helpers.tiny import make_tiny
from trimtab.adapters import UserError, load_adapter


def observation(adapter, seed=3):
    return adapter.example_observation(2, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return make_tiny("multi_task_dit", tmp_path_factory.mktemp("dit") / "policy")


@pytest.fixture(scope="module")
def adapter(options):
    return load_adapter(options)


def test_equals_the_policy_that_lerobot_itself_loads(options, adapter):
    """LeRobot's loader starts from CLIP's weights, ours from none."""
    from lerobot.policies.multi_task_dit.modeling_multi_task_dit import MultiTaskDiTPolicy

    raw, noise = observation(adapter), noise_like(adapter, 2)
    chunk = adapter.denoise(adapter.observe(raw), noise)
    ours = adapter.policy
    assert ours.config.vision_encoder_name == ours.config.text_encoder_name == options.backbone
    adapter.policy = MultiTaskDiTPolicy.from_pretrained(options.path)
    try:
        expected = stepwise(adapter, adapter.preprocess(raw), noise)
    finally:
        adapter.policy = ours
    assert (chunk - expected).abs().max() <= 1e-5


def test_needs_no_weights_of_clip(tmp_path):
    options = make_tiny("multi_task_dit", tmp_path / "policy")
    (tmp_path / "policy" / "clip" / "model.safetensors").unlink()
    load_adapter(options)
    options.backbone = str(tmp_path / "nowhere" / "clip")
    with pytest.raises(UserError, match=r"--policy.backbone: there is no folder .*nowhere/clip"):
        load_adapter(options)


def test_first_of_two_observations_and_the_task_matter(adapter):
    raw, noise = observation(adapter), noise_like(adapter, 2)
    chunk = adapter.denoise(adapter.observe(raw), noise)
    earlier = {**raw, "observation.state": raw["observation.state"].clone()}
    earlier["observation.state"][:, 0] += 0.3
    assert not torch.equal(chunk, adapter.denoise(adapter.observe(earlier), noise))
    other_task = adapter.observe({**raw, "task": ["close the drawer", "pick up the red cube"]})
    changed = adapter.denoise(other_task, noise)
    assert not torch.equal(chunk[0], changed[0])
    assert torch.equal(chunk[1], changed[1])


def test_ddpm_is_switched_to_ddim(tmp_path):
    options = make_tiny("multi_task_dit", tmp_path / "policy", objective="diffusion")
    adapter = load_adapter(options)
    assert type(adapter.policy.objective.noise_scheduler).__name__ == "DDIMScheduler"
    assert adapter.policy.objective.num_inference_steps == 10
    assert any("DDPM" in note and "num_inference_steps" in note for note in adapter.notes)
    options.num_inference_steps = 21  # trained with 20
    with pytest.raises(UserError, match=r"--policy.num_inference_steps: must be between 1 and 20"):
        load_adapter(options)


def test_number_of_integration_steps(options, adapter):
    options.num_inference_steps = 5
    try:
        finer = load_adapter(options)
    finally:
        options.num_inference_steps = None
    assert finer.policy.config.num_integration_steps == 5
    assert finer.notes == []
    raw, noise = observation(adapter), noise_like(adapter, 2)
    assert not torch.equal(
        finer.denoise(finer.observe(raw), noise), adapter.denoise(adapter.observe(raw), noise)
    )


def test_half_precision_is_refused(tmp_path):
    options = make_tiny("multi_task_dit", tmp_path / "policy")
    options.dtype = "bfloat16"
    with pytest.raises(UserError, match=r"--policy.dtype: this multi_task_dit policy runs in float32"):
        load_adapter(options)


def test_chunk_ends_with_the_horizon(tmp_path):
    adapter = load_adapter(make_tiny("multi_task_dit", tmp_path / "policy", n_action_steps=8))
    assert adapter.chunk_shape == (7, 3)  # of a horizon of 8, the first belongs to the past
    raw, noise = observation(adapter), noise_like(adapter, 2)
    chunk = adapter.denoise(adapter.observe(raw), noise)
    assert (chunk - stepwise(adapter, adapter.preprocess(raw), noise)).abs().max() <= 1e-5
