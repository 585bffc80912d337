"""Saved processors that lost a step, a file or a name: one line says what is there and what is wanted."""

import json
import shutil

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from safetensors.torch import load_file, save_file

from tests.helpers.tiny import make_tiny
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.errors import LONGEST, reason

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A policy with a camera whose name has an underscore."""
    folder = tmp_path_factory.mktemp("processors") / "policy"
    features = {
        "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        "observation.images.cam_high": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
    }
    make_tiny("diffusion", folder, input_features=features)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "policy")


def load(folder):
    return load_adapter(PolicyConfig(path=str(folder), device="cpu"))


def edit_steps(folder, name, edit):
    path = folder / name
    content = json.loads(path.read_text())
    content["steps"] = edit(content["steps"])
    path.write_text(json.dumps(content))


def without(name):
    return lambda steps: [step for step in steps if step["registry_name"] != name]


def custom(steps):
    return [{"registry_name": "truncate_state", "config": {"keep": 6}}, *steps]


def stateless(steps):
    return [{key: value for key, value in step.items() if key != "state_file"} for step in steps]


def newer(steps):
    return [{**step, "config": {**step.get("config", {}), "new_option": 1}} for step in steps]


STATE_FILE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
CASES = {
    "a step of somebody's": (
        PRE,
        custom,
        r"preprocessor.json has a step 'truncate_state', which LeRobot does not know; .* "
        r"--policy.discover_packages_path=$",
    ),
    "no state_file": (
        POST,
        stateless,
        rf"'unnormalizer_processor' names no state_file; {STATE_FILE} lies beside it",
    ),
    "nothing un-normalises": (
        POST,
        without("unnormalizer_processor"),
        r"ACTION was normalised by MIN_MAX in training, but no step of .*postprocessor.json un-normalises it "
        r"\(it has device_processor\)",
    ),
    "nothing normalises": (
        PRE,
        without("normalizer_processor"),
        r"was normalised by MIN_MAX in training, but no step of .*preprocessor.json normalises it",
    ),
    "no step for the device": (PRE, without("device_processor"), r"has no step 'device_processor' \(it has"),
    "an option of a newer LeRobot": (
        PRE,
        newer,
        r"step 'rename_observations_processor': .*unexpected keyword argument 'new_option'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_is_there(name, folder):
    file, edit, message = CASES[name]
    edit_steps(folder, file, edit)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_config_that_contradicts_the_processors_is_noted(folder):
    """LeRobot normalises as the processors say; another mode in config.json has no effect."""
    before = load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["normalization_mapping"]["ACTION"] = "MEAN_STD"
    (folder / "config.json").write_text(json.dumps(config))
    adapter, chunk = load(folder), torch.rand(2, 3, 2)
    note = "un-normalises 'action' by MIN_MAX, where config.json says MEAN_STD"
    assert [note in text for text in adapter.notes] == [True] and not before.notes
    assert torch.equal(adapter.postprocess(chunk), before.postprocess(chunk))


def test_trained_without_normalisation(folder):
    """What a config says was not normalised needs no step; the actions are LeRobot's, as they are."""
    edit_steps(folder, POST, without("unnormalizer_processor"))
    config = json.loads((folder / "config.json").read_text())
    config["normalization_mapping"]["ACTION"] = "IDENTITY"
    (folder / "config.json").write_text(json.dumps(config))
    chunk = torch.rand(2, 3, 2)
    assert torch.equal(load(folder).postprocess(chunk), chunk)


def test_statistics_under_the_migration_tools_name(folder):
    """LeRobot's own migration writes `cam.high` for `cam_high`, and its normaliser then passes raw pixels."""
    for file in folder.glob("policy_*processor*.safetensors"):
        save_file({k.replace("cam_high", "cam.high"): v for k, v in load_file(file).items()}, file)
    with pytest.raises(UserError) as caught:
        load(folder)
    said = str(caught.value)
    assert "'observation.images.cam_high' by MEAN_STD" in said
    assert "there are statistics of" in said and "'observation.images.cam.high' looks like it" in said
    assert "policy_preprocessor_step_3_normalizer_processor.safetensors" in said


def test_a_foreign_error_keeps_the_sentence_that_helps():
    def raised(outer, cause):
        try:
            raise outer from cause
        except Exception as error:
            return error

    hidden = raised(ValueError("Couldn't instantiate class X."), TypeError("The chunk size is 8."))
    assert reason(hidden) == "Couldn't instantiate class X. (The chunk size is 8.)"
    assert reason(raised(ValueError("no: because"), TypeError("because"))) == "no: because"
    assert reason(RuntimeError("Error(s) in loading:\n\tsize mismatch for a")) == (
        "Error(s) in loading: size mismatch for a"
    )
    assert reason(KeyError("observation.state")) == "KeyError: 'observation.state'"
    assert reason(ValueError()) == "ValueError"
    assert reason(ValueError("one\ntwo\nthree"), last=True) == "three"
    long = reason(ValueError("begin " + "x " * LONGEST + "end"))
    assert long.startswith("begin") and long.endswith("end") and len(long) < LONGEST + 10


CONFIGS = {
    "no inputs": (
        {"input_features": None},
        r'input_features are empty; .* \{"observation.state": \{"type": "STATE',
    ),
    "no inputs, empty": ({"input_features": {}}, r"input_features are empty"),
    "no outputs": (
        {"output_features": None},
        r'output_features are empty; .* \{"action": \{"type": "ACTION", "sh',
    ),
    "no action": (
        {"output_features": {"torque": {"type": "ACTION", "shape": [2]}}},
        r"output_features hold torque \(ACTION\), but no 'action' of type ACTION",
    ),
    "a null where a number stands": ({"horizon": None}, r"horizon is null; it needs a value"),
    "no steps": ({"n_action_steps": 0}, r"n_action_steps is 0; it must be at least 1"),
    "the class's own sentence": (
        {"horizon": 10},
        r"horizon should be an integer multiple of the downsampling factor",
    ),
    "a newer field": (
        {"of_0_9": 1},
        r"`of_0_9` are not valid for DiffusionConfig; LeRobot 0\.\S+ has no such",
    ),
    "channels last": (
        {"input_features": {"observation.image": {"type": "VISUAL", "shape": [64, 48, 3]}}},
        r"\(channels, height, width\): \[3, 64, 48\]",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_refused_with_its_mend(name, folder):
    fields, message = CONFIGS[name]
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **fields}))
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert "config.json cannot be loaded" in str(caught.value)


def test_the_instruction_among_the_features(folder):
    content = json.loads((folder / "config.json").read_text())
    content["input_features"]["task"] = {"type": "LANGUAGE", "shape": [1]}
    (folder / "config.json").write_text(json.dumps(content))
    assert "task" not in load(folder).config.input_features
