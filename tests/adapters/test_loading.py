"""Loading that cannot lie: what is half-written, broken or cannot be steered is refused in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.files import file_hash, weights_hash


@pytest.fixture
def folder(pusht_policy, tmp_path):
    return shutil.copytree(pusht_policy, tmp_path / "policy")


def load(folder):
    return load_adapter(PolicyConfig(path=str(folder), device="cpu"))


def test_loads_what_was_saved_frozen(folder):
    before = file_hash(folder)
    adapter = load(folder)
    saved = load_file(str(folder / "model.safetensors"))
    state = adapter.policy.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    assert not adapter.policy.training
    assert not any(parameter.requires_grad for parameter in adapter.policy.parameters())
    assert file_hash(folder) == before


def test_weights_hash_sees_one_changed_number(folder):
    policy = load(folder).policy
    before = weights_hash(policy)
    assert before == weights_hash(load(folder).policy)
    with torch.no_grad():
        next(policy.parameters()).view(-1)[0] += 1e-3
    assert weights_hash(policy) != before


def test_checkpoint_folder_of_lerobot_train(folder, tmp_path):
    checkpoint = tmp_path / "checkpoints" / "000100"
    checkpoint.mkdir(parents=True)
    folder.rename(checkpoint / "pretrained_model")
    assert load(checkpoint).policy_type == "diffusion"


def edit_config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def truncate(name, keep):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def edit_weights(edit):
    def damage(folder):
        tensors = load_file(str(folder / "model.safetensors"))
        edit(tensors)
        save_file(tensors, str(folder / "model.safetensors"))

    return damage


def drop_first(tensors):
    del tensors[next(iter(tensors))]


def grow_first(tensors):
    name = next(iter(tensors))
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def add_one(tensors):
    tensors["surplus"] = torch.zeros(1)


def poison(tensors):
    tensors[next(iter(tensors))].view(-1)[0] = float("nan")


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "lacks config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "no processor": (lambda f: (f / "policy_preprocessor.json").unlink(), "lacks policy_preprocessor.json"),
    "config cut short": (truncate("config.json", 0.5), "is not JSON"),
    "config without type": (edit_config(type=None), "has no 'type'"),
    "config of another shape": (edit_config(down_dims=[16, 64]), "does not fit the policy"),
    "config with an unknown field": (edit_config(nonsense=1), "cannot be loaded"),
    "weights cut short": (truncate("model.safetensors", 0.9), "is truncated or no safetensors file"),
    "weights empty": (truncate("model.safetensors", 0.0), "is truncated or no safetensors file"),
    "a tensor missing": (edit_weights(drop_first), "1 tensors missing"),
    "a tensor too many": (edit_weights(add_one), "1 tensors unknown"),
    "a tensor of another shape": (edit_weights(grow_first), "1 tensors of another shape"),
    "NaN in the weights": (edit_weights(poison), "holds NaN or Inf"),
    "processor cut short": (truncate("policy_preprocessor.json", 0.5), "processors in"),
    "vqbet": (edit_config(type="vqbet"), "type 'vqbet' cannot be steered: it draws categorical codes"),
    "tdmpc": (edit_config(type="tdmpc"), "type 'tdmpc' cannot be steered: it plans"),
    "pi0_fast": (edit_config(type="pi0_fast"), "action tokens"),
    "no adapter": (edit_config(type="unheard_of"), "no adapter for policies of type 'unheard_of'"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_clear_line(name, folder):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert str(caught.value).startswith("--policy.path: ")
    assert "\n" not in str(caught.value)


def test_missing_folder_and_repository(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a folder nor a reachable Hub repository: no/such"):
        load("no/such")
    with pytest.raises(UserError, match="name the folder"):
        load_adapter(PolicyConfig())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        load(tmp_path / "file")


def test_unusable_device(folder):
    with pytest.raises(UserError, match=r"--policy.device: 'warp' is not usable"):
        load_adapter(PolicyConfig(path=str(folder), device="warp"))
