"""What serves training alone, or another way to run, is off at inference; the actions stay."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.adapter_cases import noise_like
from tests.helpers.tiny import make_tiny
from trimtab.adapters import UserError, load_adapter

COMPILED = ("diffusion", "smolvla", "pi0", "pi05")
REAL_TIME = ("smolvla", "pi0", "pi05", "evo1", "molmoact2")


@pytest.fixture(scope="module")
def options(request, tmp_path_factory):
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param) / "policy")


def actions(options):
    adapter = load_adapter(options)
    observation = adapter.example_observation(2, torch.Generator().manual_seed(3))
    return adapter, adapter.denoise(adapter.observe(observation), noise_like(adapter, 2))


def changed(options, tmp_path, **fields):
    """The policy with other fields in its config; its backbone and tokenizer stay where they are."""
    import shutil

    folder = shutil.copytree(options.path, tmp_path / "changed")
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return replace(options, path=str(folder))


@pytest.mark.parametrize("options", COMPILED, indirect=True)
def test_nothing_is_compiled(options, tmp_path, monkeypatch):
    _, expected = actions(options)

    def refuse(*args, **kwargs):
        raise AssertionError("torch.compile was called")

    monkeypatch.setattr(torch, "compile", refuse)
    adapter, ours = actions(changed(options, tmp_path, compile_model=True, compile_mode="max-autotune"))
    assert torch.equal(ours, expected)
    assert any("compile_model is off" in note for note in adapter.notes)


@pytest.mark.parametrize("options", REAL_TIME, indirect=True)
def test_no_real_time_chunking(options, tmp_path):
    _, expected = actions(options)
    adapter, ours = actions(changed(options, tmp_path, rtc_config={"enabled": True}))
    assert torch.equal(ours, expected)
    assert adapter.config.rtc_config is None
    assert any("real-time chunking is off" in note for note in adapter.notes)


@pytest.mark.parametrize("options", ["diffusion"], indirect=True)
def test_weights_saved_compiled(options, tmp_path):
    """Under torch.compile's names, with `compile_model` on, or set to false since."""
    _, expected = actions(options)
    made = make_tiny("diffusion", tmp_path / "compiled", compile_model=True)
    path = tmp_path / "compiled" / "model.safetensors"
    assert any("unet._orig_mod." in name for name in load_file(path))
    for compile_model in (True, False):
        config = json.loads((tmp_path / "compiled" / "config.json").read_text())
        (tmp_path / "compiled" / "config.json").write_text(
            json.dumps({**config, "compile_model": compile_model})
        )
        adapter, ours = actions(made)
        assert torch.equal(ours, expected)
    assert adapter.notes == []
    weights = load_file(path)
    name = next(name for name in weights if "_orig_mod." in name)
    save_file({**weights, name.replace("_orig_mod.", ""): weights[name].clone()}, path)
    with pytest.raises(UserError, match=r"twice, once as torch.compile names it"):
        load_adapter(made)
