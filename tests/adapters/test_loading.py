"""Loading that cannot lie: what is half-written, broken or cannot be steered is refused in one line."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny import make_tiny
from trimtab.adapters import PolicyConfig, UserError, load_adapter, memory, registry
from trimtab.adapters.checkpoint.files import read_weights
from trimtab.adapters.checkpoint.identity import file_hash, settings_hashes, weights_hash
from trimtab.adapters.checkpoint.weights import one_by_one


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


def test_a_folder_is_all_that_a_fresh_process_needs(folder):
    """In a process of its own: the tests before have imported LeRobot's policies, and so registered them."""
    code = "import gc, sys; gc.disable(); from pathlib import Path; "  # quicker so
    code += "from trimtab.adapters.checkpoint.saved_config import read_config; "
    code += "print(read_config(Path(sys.argv[1])).type); gc.freeze()"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split() == ["diffusion"], done.stderr


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


def edit_statistics(which, edit):
    def damage(folder):
        path = next(folder.glob(f"policy_{which}processor_*.safetensors"))
        save_file(edit(load_file(str(path))), str(path))

    return damage


def forget(tensors):
    return {}


def blur(tensors):
    return {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}


def forget_minimum(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != "action.min"}


def drop_statistics_file(folder):
    path = folder / "policy_postprocessor.json"
    processor = json.loads(path.read_text())
    del processor["steps"][0]["state_file"]
    path.write_text(json.dumps(processor))


NO_STATE = "preprocessor.json normalises 'observation.state' by MIN_MAX but has no finite min and max"
NO_ACTION = "postprocessor.json normalises 'action' by MIN_MAX but has no finite min and max"

DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "lacks config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "no processor": (lambda f: (f / "policy_preprocessor.json").unlink(), "lacks policy_preprocessor.json"),
    "config cut short": (truncate("config.json", 0.5), "is not JSON"),
    "config without type": (edit_config(type=None), "has no 'type'"),
    "config of another shape": (edit_config(down_dims=[16, 64]), "does not fit the policy"),
    "config with an unknown field": (edit_config(nonsense=1), "cannot be loaded"),
    # What nobody foresaw: TypeError, IndexError and ZeroDivisionError of LeRobot's constructors.
    "a null among the widths": (edit_config(down_dims=[None, None]), "cannot be loaded: .*NoneType"),
    "no widths": (edit_config(down_dims=[]), "cannot be loaded: tuple index out of range"),
    "no groups": (edit_config(n_groups=0), "cannot be loaded: integer modulo by zero"),
    "weights cut short": (truncate("model.safetensors", 0.9), "is truncated or no safetensors file"),
    "weights empty": (truncate("model.safetensors", 0.0), "is truncated or no safetensors file"),
    "a tensor missing": (edit_weights(drop_first), "1 tensors missing"),
    "a tensor too many": (edit_weights(add_one), "1 tensors unknown"),
    "a tensor of another shape": (edit_weights(grow_first), "1 tensors of another shape"),
    "NaN in the weights": (edit_weights(poison), "holds NaN or Inf"),
    "no statistics of the inputs": (edit_statistics("pre", forget), NO_STATE),
    "NaN in the statistics of the inputs": (edit_statistics("pre", blur), NO_STATE),
    "no statistics of the actions": (edit_statistics("post", forget), NO_ACTION),
    "NaN in the statistics of the actions": (edit_statistics("post", blur), NO_ACTION),
    "one statistic missing": (edit_statistics("post", forget_minimum), "no finite min of it"),
    "no file of statistics": (drop_statistics_file, NO_ACTION),
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


def test_an_adapter_of_your_own_comes_before_what_is_said_of_a_type(folder, monkeypatch):
    def asked():
        raise UserError("--policy.path", "your adapter was asked")

    monkeypatch.setitem(registry._REGISTRY, "vqbet", asked)
    edit_config(type="vqbet")(folder)
    with pytest.raises(UserError, match="your adapter was asked"):
        load(folder)


def test_missing_folder_and_repository(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a folder nor a reachable Hub repository: no/such"):
        load("no/such")
    with pytest.raises(UserError, match="name the folder"):
        load_adapter(PolicyConfig())
    with pytest.raises(UserError, match=r"there is no folder no/such@v1; .* no/such, .*--policy.revision=v1"):
        load("no/such@v1")
    with pytest.raises(UserError, match=r"there is no folder https.*; .* a Hub repository as owner/name"):
        load("https://huggingface.co/no/such")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        load(tmp_path / "file")


def test_unusable_device(folder):
    with pytest.raises(UserError, match=r"--policy.device: 'warp' is not usable"):
        load_adapter(PolicyConfig(path=str(folder), device="warp"))


@pytest.mark.parametrize("policy_type, state", [("groot", "observation.state"), ("molmoact2", "action")])
def test_statistics_of_processors_of_their_own_kind(policy_type, state, tmp_path):
    options = make_tiny(policy_type, tmp_path / "policy")
    edit_statistics("pre" if state.startswith("obs") else "post", forget)(tmp_path / "policy")
    with pytest.raises(UserError, match=f"normalises '{state}' by"):
        load_adapter(options)


def test_statistics_of_older_versions_among_the_weights_are_left_out(folder):
    expected = load(folder).policy.state_dict()

    def add_old(tensors):
        tensors["normalize_inputs.buffer_observation_state.min"] = torch.full((2,), float("inf"))
        tensors["normalize_targets.buffer_action.max"] = torch.ones(2)
        tensors["unnormalize_outputs.buffer_action.max"] = torch.ones(2)

    edit_weights(add_old)(folder)
    adapter = load(folder)
    assert any("3 statistics of an older LeRobot" in note for note in adapter.notes)
    assert all(torch.equal(value, expected[name]) for name, value in adapter.policy.state_dict().items())


@pytest.mark.parametrize("name", ["tokenizer", "backbone"])
@pytest.mark.parametrize("policy_type", ["act", "diffusion"])
def test_an_option_for_what_the_policy_has_not(name, policy_type, tmp_path):
    options = make_tiny(policy_type, tmp_path / "policy")
    with pytest.raises(
        UserError, match=f"^--policy.{name}: a.* {policy_type} policy has no {name} of its own"
    ):
        load_adapter(PolicyConfig(**{**vars(options), name: "/some/folder"}))


def test_an_ignored_tokenizer_is_refused(tmp_path):
    options = make_tiny("wall_x", tmp_path / "policy")
    with pytest.raises(UserError, match=r"^--policy.tokenizer: a wall_x policy has no tokenizer of its own"):
        load_adapter(PolicyConfig(**{**vars(options), "tokenizer": "/some/folder"}))


def test_renaming_without_a_step_for_it(folder):
    path = folder / "policy_preprocessor.json"
    processor = json.loads(path.read_text())
    del processor["steps"][0]
    path.write_text(json.dumps(processor))
    with pytest.raises(UserError, match=r"^--policy.rename_map: .* no step that renames observations"):
        load_adapter(PolicyConfig(path=str(folder), device="cpu", rename_map={"a": "b"}))


def test_the_tokenizer_is_named_where_it_is_the_tokenizer_alone(folder, tmp_path):
    options = make_tiny("pi0", tmp_path / "pi0")
    hint = "--policy.path: .*name what cannot be fetched: --policy.tokenizer=FOLDER$"
    with pytest.raises(UserError, match=hint):
        load_adapter(PolicyConfig(path=options.path, device="cpu"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^--policy.tokenizer: "):
        load_adapter(PolicyConfig(path=options.path, device="cpu", tokenizer=str(tmp_path / "empty")))
    next((tmp_path / "pi0").glob("policy_preprocessor_*.safetensors")).unlink()
    with pytest.raises(UserError, match="State file") as caught:
        load_adapter(options)
    assert "fetched" not in str(caught.value)


def test_settings_are_hashed_without_where_they_lie(folder):
    before = settings_hashes(folder)
    assert {"config.json", "policy_preprocessor.json", "policy_postprocessor.json"} <= before.keys()
    assert len(before) == 5  # and two files of statistics
    edit_config(device="cuda", repo_id="a/b")(folder)
    assert settings_hashes(folder) == before
    edit_config(n_action_steps=2)(folder)
    after = settings_hashes(folder)
    assert [name for name in before if before[name] != after[name]] == ["config.json"]


@pytest.mark.parametrize("policy_type", ["diffusion", "smolvla"])
def test_executed_steps_are_the_users_choice(policy_type, tmp_path):
    """The same chunk, cut elsewhere; what no chunk can give is refused."""
    options = make_tiny(policy_type, tmp_path / "policy")
    plain, cut = load_adapter(options), load_adapter(replace(options, n_action_steps=2))
    assert cut.chunk_shape == (2, plain.chunk_shape[1]) and plain.chunk_shape[0] > 2
    assert cut.noise_spec.shape == plain.noise_spec.shape
    generator = torch.Generator().manual_seed(0)
    observation = plain.example_observation(2, generator)
    noise = torch.randn((2, *plain.noise_spec.shape), generator=generator)
    chunks = [adapter.denoise(adapter.observe(observation), noise) for adapter in (plain, cut)]
    assert torch.equal(chunks[0][:, :2], chunks[1])
    most = 7 if policy_type == "diffusion" else 8  # 8 steps from the first of two observations; or all 8
    for steps in (0, most + 1):
        with pytest.raises(UserError, match=f"--policy.n_action_steps: must be between 1 and {most}"):
            load_adapter(replace(options, n_action_steps=steps))


def test_weights_are_in_memory_one_at_a_time(tmp_path):
    """64 MiB in two shards: neither reading them nor what is loaded of them keeps the files in memory."""
    read, process = {}, psutil.Process()
    for shard in range(2):
        part = {f"old.{shard}.{i}": torch.randn(2**21) for i in range(4)}
        save_file(part, tmp_path / f"{shard}.safetensors")
        read |= {name: value.sum() for name, value in part.items()}
    del part
    files = [tmp_path / f"{shard}.safetensors" for shard in range(2)]
    read_weights(files)  # what the first reading leaves for good, such as buffers of the allocator
    before = process.memory_info().rss
    tensors = read_weights(files)
    saved = {name.replace("old", "new"): tensor for name, tensor in tensors.items()}
    saved["again"], saved["made"] = saved["new.0.0"], torch.ones(3)
    most = []
    for _ in range(2):
        found = {}
        for name, value in one_by_one(saved, tensors, files):
            found[name] = value.sum()
            most.append(process.memory_info().rss - before)
        expected = {name.replace("old", "new"): value for name, value in read.items()}
        assert found == {**expected, "again": read["old.0.0"], "made": torch.tensor(3.0)}
    assert max(most) < 2**24


def test_weights_that_do_not_fit_are_refused_before_they_are_read(folder, monkeypatch, capsys):
    monkeypatch.setattr(memory, "LARGE", 1)
    load(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"weights: [\d,]+ MiB in float32(, int64)?; this machine has [\d,]+ MiB left", line
    ), line
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(
        UserError, match=r"--policy.path: its weights take .* this machine has 0 MiB left; free"
    ):
        load(folder)


def test_files_that_a_container_keeps_are_memory_that_it_has(tmp_path, monkeypatch):
    for name, text in (
        ("memory.max", "1000"),
        ("memory.current", "900"),
        ("memory.stat", "anon 1\ncache 700"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "CGROUPS", [(str(tmp_path), "memory.max", "memory.current", "cache")])
    assert memory.available_memory() == 800
    (tmp_path / "memory.max").write_text("max")
    assert memory.available_memory() > 1000
