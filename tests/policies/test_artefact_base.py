"""The base that an artefact refers to comes back as it was steered, or is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_diffusion
from tests.helpers.adapter_cases import noise_like
from tests.helpers.tiny import make_tiny
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.artefact import load_artefact, read_config, save_artefact
from trimtab.policies.noise_space import RepeatNoiseConfig

RENAMES = {"observation.eef": "observation.state"}


def steer(options, out):
    """An artefact of an untrained actor, and the base it was made with."""
    adapter, noise = load_adapter(options), RepeatNoiseConfig()
    features = adapter.features(adapter.example_conditioning(1, torch.Generator().manual_seed(0)))
    actor = NoiseActor(features.shape[-1], noise.build(adapter.noise_spec), ActorConfig(hidden=8, layers=1))
    return save_artefact(out, actor, noise, adapter, options, Path(options.path), {}), adapter


def load(folder, **options):
    return load_artefact(PolicyConfig(path=str(folder), device="cpu", **options)).adapter


def same_function(adapter, other):
    observation = adapter.example_observation(1, torch.Generator().manual_seed(1))
    noise = noise_like(adapter, 1)
    chunks = [a.denoise(a.observe(observation), noise) for a in (adapter, other)]
    return torch.equal(*chunks)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def perturb(path):
    save_file({k: v + 0.5 if v.is_floating_point() else v for k, v in load_file(path).items()}, path)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A SmolVLA steered in bfloat16 with a backbone of its own place, artefact and all moved elsewhere."""
    root = tmp_path_factory.mktemp("before") / "all"
    made = make_tiny("smolvla", root / "policy")
    shutil.move(made.backbone, root / "backbone")
    values = {**vars(made), "backbone": str(root / "backbone"), "dtype": "bfloat16", "rename_map": RENAMES}
    artefact, adapter = steer(PolicyConfig(**values), root / "runs" / "artefact")
    there = tmp_path_factory.mktemp("after") / "all"
    shutil.move(root, there)
    return there / artefact.relative_to(root), adapter


def test_the_base_comes_back_as_it_was_steered(moved):
    artefact, adapter = moved
    assert json.loads((artefact / "config.json").read_text())["base"]["backbone"] == "../../backbone"
    again = load(artefact)
    assert next(again.policy.parameters()).dtype == torch.bfloat16
    assert Path(again.config.vlm_model_name) == artefact.parents[1] / "backbone"
    assert "observation.eef" in again.example_observation(1, torch.Generator())
    assert same_function(adapter, again)


def test_what_the_user_says_anew_comes_first(moved, tmp_path):
    artefact, adapter = moved
    other = shutil.copytree(artefact.parents[1] / "backbone", tmp_path / "backbone")
    again = load(artefact, dtype="float32", backbone=str(other), rename_map={"observation.pose": "a"})
    assert {p.dtype for p in again.policy.parameters() if p.is_floating_point()} == {torch.float32}
    assert again.config.vlm_model_name == str(other)
    assert again.renames() == {"observation.pose": "a"}
    assert not same_function(adapter, load(artefact, num_inference_steps=1))


def test_a_lost_backbone_names_its_option(moved, tmp_path):
    artefact, _ = moved
    whole = shutil.copytree(artefact.parents[1], tmp_path / "all")
    shutil.move(whole / "backbone", tmp_path / "elsewhere")
    copy = whole / "runs" / "artefact"
    with pytest.raises(UserError, match=r"--policy.backbone: .* not where it was"):
        load(copy)
    load(copy, backbone=str(tmp_path / "elsewhere"))


def test_an_engine_is_of_the_machine_and_changes_nothing(tmp_path, monkeypatch, capsys):
    """Steered and loaded with it and without, by trimtab and by LeRobot's commands (``config.base``)."""
    compile_ = torch.compile  # without a C++ compiler
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compile_(f, dynamic=dynamic, backend="eager"))
    options = PolicyConfig(path=str(make_diffusion(tmp_path / "base")), device="cpu", engine="compile")
    artefact, adapter = steer(options, tmp_path / "artefact")
    config = read_config(artefact)
    assert config.base.engine == "eager"
    plain, named = load(artefact), load(artefact, engine="compile")
    config.base.engine = "compile"
    by_lerobot = load_artefact(PolicyConfig(path=str(artefact), device="cpu"), config).adapter
    assert "denoise" not in vars(plain)
    for other in (adapter, named, by_lerobot):
        assert "denoise" in vars(other) and all(same_function(plain, other) for _ in range(4))
    named.check_identity(plain.identity(tmp_path / "base"), tmp_path / "base")
    assert capsys.readouterr().err == ""


@pytest.fixture
def steered(tmp_path):
    """An artefact and its base, a diffusion policy."""
    base = make_diffusion(tmp_path / "base")
    return steer(PolicyConfig(path=str(base), device="cpu"), tmp_path / "artefact")[0], base


@pytest.mark.parametrize("processor", ["preprocessor", "postprocessor"])
def test_changed_statistics_are_caught(steered, processor):
    artefact, base = steered
    load(artefact)
    state = next(base.glob(f"policy_{processor}_*.safetensors"))
    perturb(state)
    with pytest.raises(UserError, match=rf"is not the base that .* steers: {state.name} changed"):
        load(artefact)


def test_changed_settings_are_caught(steered):
    artefact, base = steered
    edit(base / "config.json", lambda config: config.update(n_action_steps=2))
    with pytest.raises(UserError, match=r"steers: config.json changed"):
        load(artefact)


def test_another_machine_is_no_other_base(steered):
    artefact, base = steered
    elsewhere = {"device": "cuda", "pretrained_path": "/data/x", "repo_id": "a/b", "push_to_hub": True}
    edit(base / "config.json", lambda config: config.update(elsewhere))
    edit(base / "policy_preprocessor.json", lambda p: p["steps"][2]["config"].update(device="cuda"))
    load(artefact)


def test_weights_in_memory_are_compared_where_they_can_be(steered):
    artefact, _ = steered
    edit(artefact / "config.json", lambda config: config["base"].update(weights_sha256="0" * 64))
    with pytest.raises(UserError, match="the weights in memory changed"):
        load(artefact)
    edit(artefact / "config.json", lambda config: config["base"].update(weights_device="cuda"))
    load(artefact)


def test_an_artefact_that_says_less_of_its_base_is_refused(steered):
    artefact, _ = steered
    new = ("files", "weights_dtype", "weights_device", "dtype", "rename_map", "tokenizer", "backbone")

    def age(config):
        for name in (*new, "base_path"):
            del config["base"][name]

    edit(artefact / "config.json", age)
    with pytest.raises(UserError, match=r"--policy.path: .* changed"):
        load(artefact)


def test_frozen_parts_belong_to_the_base(tmp_path):
    options = make_tiny("fastwam", tmp_path / "policy")
    artefact, adapter = steer(options, tmp_path / "artefact")
    assert same_function(adapter, load(artefact))
    perturb(Path(options.backbone) / "text_encoder" / "model.safetensors")
    with pytest.raises(UserError, match=r"steers: text_encoder/model.safetensors changed"):
        load(artefact)
