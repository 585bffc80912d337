"""What FastWAM has of its own: frozen parts outside the checkpoint, older weight names, a fixed seed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.adapter_cases import noise_like
from tests.helpers.tiny import make_tiny
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.lerobot.injection import NoiseInjector


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return make_tiny("fastwam", tmp_path_factory.mktemp("fastwam") / "policy")


@pytest.fixture(scope="module")
def adapter(options):
    return load_adapter(options)


def edited(options, folder, **fields):
    """A copy of the policy's folder with other config fields."""
    folder.mkdir()
    for file in Path(options.path).iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return PolicyConfig(path=str(folder), device="cpu", backbone=options.backbone)


def test_lerobot_itself_always_draws_the_same_noise(adapter):
    observation = adapter.example_observation(2, torch.Generator().manual_seed(0))
    drawn = torch.randn((1, *adapter.noise_spec.shape), generator=torch.Generator().manual_seed(42))
    expected = adapter.policy.predict_action_chunk(adapter.preprocess(observation))
    chunk = adapter.denoise(adapter.observe(observation), drawn.repeat(2, 1, 1))
    assert (chunk - adapter.executed(expected)).abs().max() <= 1e-5
    assert any("inference_seed 42" in note for note in adapter.notes)


def test_equals_select_action(adapter):
    observation = adapter.example_observation(2, torch.Generator().manual_seed(0))
    noise, batch = noise_like(adapter, 2), adapter.preprocess(observation)
    adapter.policy.reset()
    with NoiseInjector(noise.split(1)) as injector:
        executed = [adapter.policy.select_action(dict(batch)) for _ in range(adapter.chunk_shape[0])]
    injector.check("fastwam")
    chunk = adapter.denoise(adapter.observe(observation), noise)
    assert (chunk - torch.stack(executed, 1)).abs().max() <= 1e-5


def test_every_input_matters(adapter):
    generator = torch.Generator().manual_seed(0)
    first, second = adapter.example_observation(1, generator), adapter.example_observation(1, generator)
    second["task"] = ["close the drawer"]
    noise = noise_like(adapter, 1)
    chunk = adapter.denoise(adapter.observe(first), noise)
    for key in first:
        other = adapter.observe({**first, key: second[key]})
        assert not torch.allclose(chunk, adapter.denoise(other, noise), atol=1e-6), key


def test_the_inference_steps_are_honoured(adapter, options):
    more = load_adapter(PolicyConfig(**{**vars(options), "num_inference_steps": 6}))
    observation = adapter.example_observation(1, torch.Generator().manual_seed(0))
    noise = noise_like(adapter, 1)
    chunk = more.denoise(more.observe(observation), noise)
    assert not torch.allclose(chunk, adapter.denoise(adapter.observe(observation), noise))
    with NoiseInjector(noise):
        expected = more.policy.predict_action_chunk(more.preprocess(observation))
    assert (chunk - more.executed(expected)).abs().max() <= 1e-5


def test_older_weight_names_are_loaded(adapter, options, tmp_path):
    older = edited(options, tmp_path / "older")
    file = tmp_path / "older" / "model.safetensors"
    weights = load_file(file)
    renamed = {
        re.sub(r"layers\.(\d+)\.blocks\.(\w+)\.", r"mixtures.\2.blocks.\1.", k): v for k, v in weights.items()
    }
    assert set(renamed) != set(weights)
    save_file(renamed, file)
    again = load_adapter(older)
    for name, value in adapter.policy.state_dict().items():
        assert torch.equal(value, again.policy.state_dict()[name]), name


def test_half_precision_needs_cuda(options, tmp_path):
    adapter = load_adapter(edited(options, tmp_path / "half", torch_dtype="bfloat16"))
    assert any("float32" in note for note in adapter.notes)
    with pytest.raises(UserError, match=r"--policy.dtype: .*CUDA"):
        load_adapter(PolicyConfig(**{**vars(options), "dtype": "bfloat16"}))


def test_wrong_modes_are_refused(options, adapter, tmp_path):
    video = {**adapter.config.video_dit_config, "video_attention_mask_mode": "bidirectional"}
    with pytest.raises(UserError, match="bidirectional"):
        load_adapter(edited(options, tmp_path / "mode", video_dit_config=video))
    with pytest.raises(UserError, match="text encoder"):
        load_adapter(edited(options, tmp_path / "text", load_text_encoder=False))


def test_missing_frozen_parts_name_the_option(options, tmp_path):
    with pytest.raises(UserError, match=r"--policy.backbone: .* no folder 'vae'"):
        load_adapter(PolicyConfig(path=options.path, device="cpu", backbone=str(tmp_path)))
    hub = edited(options, tmp_path / "hub", text_encoder_model_id="Wan-AI/Wan2.2-TI2V-5B-Diffusers")
    with pytest.raises(UserError, match=r"--policy.backbone: .* name a folder with 'vae'"):
        load_adapter(PolicyConfig(path=hub.path, device="cpu"))


def test_frozen_parts_in_shards(options, adapter, tmp_path):
    from transformers import UMT5EncoderModel

    backbone = Path(shutil.copytree(options.backbone, tmp_path / "wan"))
    text_encoder = UMT5EncoderModel.from_pretrained(backbone / "text_encoder")
    (backbone / "text_encoder" / "model.safetensors").unlink()
    text_encoder.save_pretrained(backbone / "text_encoder", max_shard_size="5KB")
    shards = sorted((backbone / "text_encoder").glob("*.safetensors"))
    assert len(shards) > 1
    sharded = PolicyConfig(**{**vars(options), "backbone": str(backbone)})
    again = load_adapter(sharded)
    assert again.identity(options.path)["weights_sha256"] == adapter.identity(options.path)["weights_sha256"]
    weights = load_file(shards[-1])
    weights.pop(sorted(weights)[0])
    save_file(weights, shards[-1], metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--policy.backbone: .*2 tensors missing"):  # one, of two names
        load_adapter(sharded)
    shards[-1].unlink()
    with pytest.raises(UserError, match=r"--policy.backbone: "):
        load_adapter(sharded)


def test_frozen_parts_without_safetensors_are_refused(options, tmp_path):
    backbone = Path(shutil.copytree(options.backbone, tmp_path / "wan"))
    next((backbone / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"--policy.backbone: .*vae holds no weights in safetensors"):
        load_adapter(PolicyConfig(**{**vars(options), "backbone": str(backbone)}))
