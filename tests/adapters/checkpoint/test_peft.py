"""A LoRA checkpoint, saved as `lerobot-train --peft.method_type=LORA` does, as a base policy."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.adapter_cases import noise_like
from tests.helpers.lora_folder import make_lora
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.identity import file_hash


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny SmolVLA and a LoRA of it."""
    return make_lora(tmp_path_factory.mktemp("peft"))


def test_equals_lerobots_own_peft_policy(folders):
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from peft import PeftModel

    options, lora = folders
    adapter = load_adapter(PolicyConfig(path=str(lora), device="cpu"))
    observation = adapter.example_observation(2, torch.Generator().manual_seed(3))
    noise = noise_like(adapter, 2)
    chunk = adapter.denoise(adapter.observe(observation), noise)
    theirs = PeftModel.from_pretrained(SmolVLAPolicy.from_pretrained(options.path), lora)
    expected = theirs.predict_action_chunk(adapter.preprocess(observation), noise=noise)
    assert (chunk - adapter.executed(expected)).abs().max() <= 1e-5
    plain = load_adapter(options)
    assert not torch.allclose(chunk, plain.denoise(plain.observe(observation), noise), atol=1e-3)
    assert not any(parameter.requires_grad for parameter in adapter.policy.parameters())


def test_of_a_policy_that_was_compiled(folders, tmp_path):
    """LeRobot compiles parts of a policy in place, and PEFT saves what it finds there."""
    copy = shutil.copytree(folders[1], tmp_path / "lora")
    state = load_file(copy / "adapter_model.safetensors")
    part = "base_model.model.model."
    named = {name.replace(part, f"{part}_orig_mod."): tensor for name, tensor in state.items()}
    assert named.keys() != state.keys()
    save_file(named, copy / "adapter_model.safetensors")
    plain, compiled = (load_adapter(PolicyConfig(path=str(one), device="cpu")) for one in (folders[1], copy))
    observation, noise = plain.example_observation(1, torch.Generator().manual_seed(3)), noise_like(plain, 1)
    chunks = [one.denoise(one.observe(observation), noise) for one in (plain, compiled)]
    assert torch.equal(*chunks)


def test_without_processors(folders, tmp_path):
    copy = shutil.copytree(folders[1], tmp_path / "lora")
    for file in copy.glob("policy_p*"):
        file.unlink()
    with pytest.raises(UserError, match="a LoRA has them beside it: copy the files policy_"):
        load_adapter(PolicyConfig(path=str(copy), device="cpu"))


def test_hash_covers_adapter_and_base(folders, tmp_path):
    options, lora = folders
    before = file_hash(lora)
    base = tmp_path / "base"
    shutil.copytree(options.path, base)
    assert file_hash(lora, str(base)) == before
    state = load_file(base / "model.safetensors")
    name = next(iter(state))
    state[name] = state[name] + 1
    save_file(state, base / "model.safetensors")
    assert file_hash(lora, str(base)) != before


def test_moved_base(folders, tmp_path):
    options, lora = folders
    copy = tmp_path / "lora"
    shutil.copytree(lora, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (copy / "adapter_config.json").write_text(json.dumps(config))
    moved = PolicyConfig(path=str(copy), device="cpu")
    with pytest.raises(UserError, match=r"--policy.base_path: the base policy of the LoRA checkpoint"):
        load_adapter(moved)
    load_adapter(replace(moved, base_path=options.path))


def test_identity_and_artefact_with_a_moved_base(folders, tmp_path):
    from trimtab.policies.actor import ActorConfig, NoiseActor
    from trimtab.policies.artefact import load_artefact, save_artefact
    from trimtab.policies.noise_space import RepeatNoiseConfig

    options, lora = folders
    root = tmp_path / "before"
    base = shutil.copytree(options.path, root / "base")
    copy = shutil.copytree(lora, root / "lora")
    config = json.loads((copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (copy / "adapter_config.json").write_text(json.dumps(config))
    moved = PolicyConfig(path=str(copy), device="cpu", base_path=str(base))
    adapter = load_adapter(moved)
    identity = adapter.identity(copy)
    assert identity == load_adapter(PolicyConfig(path=str(lora), device="cpu")).identity(lora)
    adapter.check_identity(identity, copy)

    noise = RepeatNoiseConfig()
    width = adapter.features(adapter.example_conditioning(1, torch.Generator())).shape[-1]
    actor = NoiseActor(width, noise.build(adapter.noise_spec), ActorConfig(hidden=8, layers=1))
    save_artefact(root / "artefact", actor, noise, adapter, moved, copy, {})
    there = tmp_path / "after"
    shutil.move(root, there)
    again = load_artefact(PolicyConfig(path=str(there / "artefact"), device="cpu")).adapter
    assert again.weights_files[1] == there / "base" / "model.safetensors"
    observation = adapter.example_observation(1, torch.Generator().manual_seed(3))
    chunks = [a.denoise(a.observe(observation), noise_like(a, 1)) for a in (adapter, again)]
    assert torch.equal(*chunks)

    shutil.move(there / "base", tmp_path / "elsewhere")
    artefact = PolicyConfig(path=str(there / "artefact"), device="cpu")
    with pytest.raises(UserError, match=r"--policy.base_path: .* not where it was"):
        load_artefact(artefact)
    artefact = replace(artefact, base_path=str(tmp_path / "elsewhere"))
    load_artefact(artefact)
    state = load_file(tmp_path / "elsewhere" / "model.safetensors")
    state[next(iter(state))].view(-1)[0] += 1
    save_file(state, tmp_path / "elsewhere" / "model.safetensors")
    with pytest.raises(UserError, match="its weights have another hash"):
        load_artefact(artefact)


def damage(change):
    def apply(lora):
        state = load_file(lora / "adapter_model.safetensors")
        change(state)
        save_file(state, lora / "adapter_model.safetensors")

    return apply


def drop(state):
    state.pop(sorted(state)[0])


def reshape(state):
    name = sorted(state)[0]
    state[name] = torch.zeros(3, 3)


@pytest.mark.parametrize("change", [drop, reshape], ids=["missing", "shape"])
def test_damaged_adapter(folders, tmp_path, change):
    copy = tmp_path / "lora"
    shutil.copytree(folders[1], copy)
    damage(change)(copy)
    with pytest.raises(UserError, match=r"--policy\.path: "):
        load_adapter(PolicyConfig(path=str(copy), device="cpu"))


def test_truncated_adapter(folders, tmp_path):
    copy = tmp_path / "lora"
    shutil.copytree(folders[1], copy)
    raw = (copy / "adapter_model.safetensors").read_bytes()
    (copy / "adapter_model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match="truncated"):
        load_adapter(PolicyConfig(path=str(copy), device="cpu"))
