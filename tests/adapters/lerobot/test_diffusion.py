"""The diffusion adapter against LeRobot's own public path."""

import json

import pytest
import torch

from tests.conftest import make_diffusion
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.identity import weights_hash
from trimtab.adapters.lerobot.diffusion import DiffusionAdapter


@pytest.fixture(params=["state", "images"])
def adapter(request, tmp_path_factory):
    folder = make_diffusion(tmp_path_factory.mktemp(request.param), images=request.param == "images")
    return load_adapter(PolicyConfig(path=str(folder), device="cpu"))


def observation(adapter, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.rand((batch, adapter.n_obs_steps, *feature.shape), generator=generator)
        for key, feature in adapter.policy.config.input_features.items()
    }


def noise_like(adapter, batch, seed=1):
    return torch.randn((batch, *adapter.noise_spec.shape), generator=torch.Generator().manual_seed(seed))


def test_equals_predict_action_chunk(adapter):
    raw, noise = observation(adapter), noise_like(adapter, 3)
    chunk = adapter.denoise(adapter.encode(adapter.preprocess(raw)), noise)
    # LeRobot's offline path takes the whole history; its preprocessor takes one step at a time.
    steps = [adapter.preprocessor({k: v[:, t] for k, v in raw.items()}) for t in range(adapter.n_obs_steps)]
    batch = {k: torch.stack([step[k] for step in steps], 1) for k in raw}
    adapter.policy.reset()
    expected = adapter.policy.predict_action_chunk(batch, noise=noise)
    assert chunk.shape == (3, *adapter.chunk_shape)
    assert (chunk - expected).abs().max() <= 1e-5
    actions = adapter.postprocess(chunk)
    assert torch.allclose(actions, adapter.postprocessor(expected), atol=1e-5)


def test_equals_select_action_with_its_queues(adapter):
    """Step LeRobot's policy as lerobot-eval does; its chunk starts from the queued history."""
    raw, noise = observation(adapter), noise_like(adapter, 3)
    adapter.policy.reset()
    first = adapter.preprocessor({k: v[:, 0] for k, v in raw.items()})
    adapter.policy.select_action(dict(first), noise=noise_like(adapter, 3, 9))
    adapter.policy._queues["action"].clear()
    second = adapter.preprocessor({k: v[:, 1] for k, v in raw.items()})
    executed = [adapter.policy.select_action(dict(second), noise=noise)]
    executed += [adapter.policy.select_action(dict(second)) for _ in range(adapter.chunk_shape[0] - 1)]
    chunk = adapter.denoise(adapter.encode(adapter.preprocess(raw)), noise)
    assert (chunk - torch.stack(executed, 1)).abs().max() <= 1e-5


def test_noise_decides_the_chunk(adapter):
    conditioning = adapter.encode(adapter.preprocess(observation(adapter)))
    noise = noise_like(adapter, 3)
    once = adapter.denoise(conditioning, noise)
    assert torch.equal(once, adapter.denoise(conditioning, noise))
    assert not torch.allclose(once, adapter.denoise(conditioning, noise_like(adapter, 3, 2)))


def test_many_noises_share_one_encoding(adapter):
    conditioning = adapter.encode(adapter.preprocess(observation(adapter, batch=2)))
    noises = noise_like(adapter, 8)
    together = adapter.denoise(conditioning.repeat_interleave(4), noises)
    for row in range(8):
        alone = adapter.denoise(conditioning[row // 4], noises[row : row + 1])
        assert (together[row] - alone[0]).abs().max() <= 1e-5


def test_wrong_noise_is_a_clear_error(adapter):
    conditioning = adapter.encode(adapter.preprocess(observation(adapter)))
    with pytest.raises(ValueError, match=r"shape \(2, 8, 2\).*takes \(3, 8, 2\)"):
        adapter.denoise(conditioning, noise_like(adapter, 2))
    with pytest.raises(ValueError, match=r"torch.float64.*takes torch.float32"):
        adapter.denoise(conditioning, noise_like(adapter, 3).double())


def test_features_are_the_global_conditioning(adapter):
    conditioning = adapter.encode(adapter.preprocess(observation(adapter)))
    assert adapter.features(conditioning).shape[0] == 3
    assert torch.equal(adapter.features(conditioning), conditioning.tensors["features"])


def test_missing_input_names_the_environment(adapter):
    with pytest.raises(UserError, match=r"--env.type: the policy needs observation"):
        adapter.preprocess({"observation.other": torch.zeros(1, 2, 3)})


def test_ddpm_is_switched_to_ddim(tmp_path):
    folder = make_diffusion(tmp_path / "ddpm", scheduler="DDPM")
    adapter = load_adapter(PolicyConfig(path=str(folder), device="cpu"))
    assert type(adapter.policy.diffusion.noise_scheduler).__name__ == "DDIMScheduler"
    assert adapter.policy.diffusion.num_inference_steps == 10
    assert any("DDPM" in note and "num_inference_steps" in note for note in adapter.notes)
    fewer = load_adapter(PolicyConfig(path=str(folder), device="cpu", num_inference_steps=3))
    assert fewer.policy.diffusion.num_inference_steps == 3


def test_verify_refuses_a_stochastic_sampler(tmp_path):
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    policy = DiffusionPolicy.from_pretrained(make_diffusion(tmp_path / "ddpm", scheduler="DDPM"))
    with pytest.raises(UserError, match="the same noise gave two different chunks"):
        DiffusionAdapter(policy, dict, torch.clone).verify()


def test_verify_refuses_a_policy_blind_to_its_noise(tmp_path):
    """A network that predicts a clean action of zero whatever it is given ends at zero."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    folder = make_diffusion(tmp_path / "policy")
    config = PreTrainedConfig.from_pretrained(folder)
    config.prediction_type = "sample"
    policy = DiffusionPolicy.from_pretrained(folder, config=config)
    torch.nn.init.zeros_(policy.diffusion.unet.final_conv[-1].weight)
    torch.nn.init.zeros_(policy.diffusion.unet.final_conv[-1].bias)
    with pytest.raises(UserError, match="two different noises gave the same chunk"):
        DiffusionAdapter(policy, dict, torch.clone).verify()


def test_number_of_steps_is_checked(tmp_path):
    folder = str(make_diffusion(tmp_path / "policy"))
    for steps in (0, -1, 21):
        with pytest.raises(UserError, match=r"--policy.num_inference_steps"):
            load_adapter(PolicyConfig(path=folder, device="cpu", num_inference_steps=steps))


def test_lerobots_default_camera_policy_loads_offline(tmp_path):
    """Its backbone has BatchNorm counters, and its config names ImageNet weights that need no download."""
    folder = make_diffusion(tmp_path / "policy", images=True, use_group_norm=False)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_backbone_weights"] = "ResNet18_Weights.IMAGENET1K_V1"
    (folder / "config.json").write_text(json.dumps(config))
    adapter = load_adapter(PolicyConfig(path=str(folder), device="cpu"))
    assert any(value.ndim == 0 for value in adapter.policy.state_dict().values())
    assert len(weights_hash(adapter.policy)) == 64
