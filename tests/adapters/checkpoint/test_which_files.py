"""Which of a folder's files count: its config says, not what is found first; what is unclear is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.adapter_cases import noise_like
from tests.helpers.tiny import make_tiny
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.identity import file_hash

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(pusht_policy, tmp_path):
    return shutil.copytree(pusht_policy, tmp_path / "policy")


def load(folder):
    return load_adapter(PolicyConfig(path=str(folder), device="cpu"))


def chunk(adapter):
    observation = adapter.example_observation(2, torch.Generator().manual_seed(3))
    return adapter.denoise(adapter.observe(observation), noise_like(adapter, 2))


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def to_shards(folder, keep_whole=False):
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    half = len(names) // 2
    files = {
        f"model-0000{n}-of-00002.safetensors": part for n, part in ((1, names[:half]), (2, names[half:]))
    }
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file)
    named = {name: file for file, part in files.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": named}))
    if not keep_whole:
        (folder / "model.safetensors").unlink()
    return sorted(files)


def test_shards(folder):
    expected = load(folder)
    files = to_shards(folder)
    adapter = load(folder)
    assert torch.equal(chunk(adapter), chunk(expected))
    assert [path.name for path in adapter.weights_files] == files
    assert adapter.identity(folder)["sha256"] == file_hash(folder)
    before = file_hash(folder)
    weights = load_file(folder / files[1])
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, folder / files[1])
    assert file_hash(folder) != before


def test_a_missing_shard(folder):
    files = to_shards(folder)
    (folder / files[0]).unlink()
    with pytest.raises(UserError, match=f"lacks 1 of the 2 shards that {INDEX} names: {files[0]}"):
        load(folder)


def test_shards_without_their_index(folder):
    to_shards(folder)
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match=f"lacks model.safetensors .*; {INDEX}, .* was not copied"):
        load(folder)


def test_an_index_that_points_elsewhere(folder):
    to_shards(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(
        UserError, match=r"names '../../secret.safetensors', which is no safetensors file beside"
    ):
        load(folder)
    (folder / INDEX).write_text("[]")
    with pytest.raises(UserError, match=r"names no shards"):
        load(folder)


def test_whole_weights_and_shards(folder):
    expected = chunk(load(folder))
    files = to_shards(folder, keep_whole=True)
    with pytest.raises(UserError, match=r"holds weights twice, in model.safetensors and in the 2 shards"):
        load(folder)
    for file in files:  # of which the index alone was left behind
        (folder / file).unlink()
    assert torch.equal(chunk(load(folder)), expected)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A tiny pi0 (with its options) and a folder with its whole weights and a LoRA beside."""
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    root = tmp_path_factory.mktemp("both")
    options = make_tiny("diffusion", root / "base")
    policy = DiffusionPolicy.from_pretrained(options.path)
    policy.config.pretrained_path = options.path
    targets = {"method_type": "LORA", "r": 2, "target_modules": ["final_conv.1", "final_conv.0.block.0"]}
    wrapped = policy.wrap_with_peft(peft_cli_overrides=targets)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.full_like(parameter, 0.3))
    folder = shutil.copytree(root / "base", root / "both")
    wrapped.save_pretrained(folder)
    return options, folder


@pytest.mark.parametrize("use_peft", [True, False])
def test_whole_weights_and_a_lora(both, use_peft, tmp_path):
    options, mixed = both
    folder = shutil.copytree(mixed, tmp_path / "both")
    edit_json(folder / "config.json", lambda config: config.update(use_peft=use_peft))
    adapter = load(folder)
    assert torch.equal(chunk(adapter), chunk(load_adapter(options))) != use_peft
    assert (adapter.weights_files[0].name == "adapter_model.safetensors") == use_peft


def test_whole_weights_and_a_lora_without_a_word(both, tmp_path):
    folder = shutil.copytree(both[1], tmp_path / "both")
    edit_json(folder / "config.json", lambda config: config.pop("use_peft"))
    with pytest.raises(UserError, match=r"holds whole weights and a LoRA .* set use_peft to true"):
        load(folder)


def test_a_lora_that_has_been_merged(folder):
    edit_json(folder / "config.json", lambda config: config.update(use_peft=True))
    with pytest.raises(
        UserError, match=r"says use_peft, but adapter_config.json and .* set use_peft to false"
    ):
        load(folder)


def test_a_lora_on_a_lora(both, tmp_path):
    lora = shutil.copytree(both[1], tmp_path / "lora")
    edit_json(lora / "config.json", lambda config: config.update(use_peft=True))
    above = shutil.copytree(lora, tmp_path / "above")
    edit_json(above / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(lora)))
    with pytest.raises(UserError, match=r"--policy.base_path: .* is a LoRA checkpoint itself"):
        load(above)


def test_what_is_there_is_said(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"lacks model.safetensors \(it holds .*pytorch_model.bin"):
        load(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    run = tmp_path / "run" / "checkpoints" / "000100"
    run.mkdir(parents=True)
    folder.rename(run / "pretrained_model")
    with pytest.raises(UserError, match=r"its last checkpoint is .*checkpoints/000100/pretrained_model"):
        load(tmp_path / "run")


CONFIGS = {
    "of transformers": ({"model_type": "Gr00tN1d7"}, "holds model_type.*another library's 'Gr00tN1d7' model"),
    "of 2024": ({"input_shapes": {}, "n_obs_steps": 2}, "LeRobot wrote such configs before 2025"),
    "of openpi": ({"action_dim": 32}, r"no 'type' \(it holds action_dim\)"),
    "a list": ([], r"no 'type' \(it holds nothing\)"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_something_else(name, folder):
    content, message = CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load(folder)
    for path in folder.glob("policy_*"):  # which others do not have, as they name their weights otherwise
        path.unlink()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=message):
        load(folder)
