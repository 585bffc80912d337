"""Checkpoints from before LeRobot 0.4: statistics among the weights, no processors; they load as they are."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from safetensors.torch import load_file, save_file

from tests.helpers.adapter_cases import noise_like
from tests.helpers.tiny import make_tiny
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.identity import file_hash, hash_files
from trimtab.adapters.checkpoint.processors import processor_files

CAMERAS = {
    "input_features": {
        "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        "observation.images.cam_high": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
        "observation.images.cam_left_wrist": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
    },
    "output_features": {"action": PolicyFeature(FeatureType.ACTION, (2,))},
}
KINDS = {
    "diffusion": {**CAMERAS, "crop_shape": (48, 48)},
    "act": {},
    "smolvla": {},
    "pi0": {},
}
SINCE = ("use_peft", "compile_model", "compile_mode", "gradient_checkpointing", "resize_shape", "crop_ratio")


def to_old_format(folder):
    """What LeRobot wrote before 0.4: its buffers' names, fewer fields in the config, a GPU's device."""
    weights = load_file(folder / "model.safetensors")
    for file in sorted(folder.glob("policy_*processor*.safetensors")):
        for name, value in load_file(file).items():
            key, statistic = name.rsplit(".", 1)
            if statistic not in ("mean", "std", "min", "max"):
                continue
            buffer = f"buffer_{key.replace('.', '_')}.{statistic}"
            places = (
                ("normalize_targets", "unnormalize_outputs") if key == "action" else ("normalize_inputs",)
            )
            weights |= {f"{place}.{buffer}": value.clone() for place in places}
    save_file(weights, folder / "model.safetensors")
    for file in folder.glob("policy_*processor*"):
        file.unlink()
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in SINCE} | {"device": "cuda"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A policy as LeRobot writes it now, and the same as before 0.4."""
    root = tmp_path_factory.mktemp(request.param)
    options = make_tiny(request.param, root / "now", **KINDS[request.param])
    old = to_old_format(shutil.copytree(root / "now", root / "before"))
    return options, replace(options, path=str(old))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "old"
    make_tiny("diffusion", folder, **KINDS["diffusion"])
    return to_old_format(folder)


@pytest.fixture
def old(made, tmp_path):
    return shutil.copytree(made, tmp_path / "old")


def load(folder):
    return load_adapter(PolicyConfig(path=str(folder), device="cpu"))


def actions(adapter, observation):
    conditioning = adapter.observe(observation)
    return adapter.postprocess(adapter.denoise(conditioning, noise_like(adapter, 2)), conditioning)


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def test_acts_as_the_same_policy_with_processors(pair, tmp_path):
    now, before = (load_adapter(options) for options in pair)
    observation = now.example_observation(2, torch.Generator().manual_seed(3))
    assert torch.equal(actions(now, observation), actions(before, observation))
    assert any("LeRobot before 0.4" in note for note in before.notes)


def test_the_folder_stays_as_it_is(old):
    def listed():
        return {file.name: hash_files([file]) for file in old.iterdir() if file.is_file()}

    files = listed()
    load(old)
    assert listed() == files and set(files) == {"config.json", "model.safetensors"}


def test_its_processors_can_be_written_elsewhere(old):
    """As `trimtab lora` and an artefact do; LeRobot itself loads what was written."""
    from lerobot.policies.factory import make_pre_post_processors

    adapter = load(old)
    observation = adapter.example_observation(2, torch.Generator().manual_seed(3))
    flat = {k: v[:, 0] for k, v in observation.items() if isinstance(v, torch.Tensor)}
    chunk = torch.rand(2, 3, 2)
    with processor_files(adapter, old) as folder:
        pre, post = make_pre_post_processors(adapter.config, pretrained_path=str(folder))
    for key, value in adapter.preprocessor(dict(flat)).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, pre(dict(flat))[key]), key
    assert torch.equal(post(chunk), adapter.postprocessor(chunk))
    assert not torch.equal(post(chunk), chunk)


def test_an_artefact_on_it_loads_and_runs_in_lerobots_commands(old, tmp_path):
    from lerobot.policies.factory import make_pre_post_processors

    from trimtab.policies.actor import ActorConfig, NoiseActor
    from trimtab.policies.artefact import load_artefact, save_artefact
    from trimtab.policies.noise_space import RepeatNoiseConfig
    from trimtab.policies.steered.modeling_trimtab import TrimtabPolicy

    adapter, noise = load(old), RepeatNoiseConfig()
    width = adapter.features(adapter.example_conditioning(1, torch.Generator())).shape[-1]
    actor = NoiseActor(width, noise.build(adapter.noise_spec), ActorConfig(hidden=8, layers=1))
    options = PolicyConfig(path=str(old), device="cpu")
    folder = save_artefact(tmp_path / "artefact", actor, noise, adapter, options, old, {})
    steered = load_artefact(PolicyConfig(path=str(folder), device="cpu"))
    identity = steered.adapter.identity(old)
    assert identity == adapter.identity(old)

    policy = TrimtabPolicy.from_pretrained(folder)
    pre, post = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    observation = adapter.example_observation(2, torch.Generator().manual_seed(3))
    one = {k: v[:, :1] if isinstance(v, torch.Tensor) else v for k, v in observation.items()}
    drawn = noise_like(adapter, 2)
    batch = pre({k: v[:, 0] if isinstance(v, torch.Tensor) else v for k, v in one.items()})
    theirs = post(policy.select_action(batch, noise=drawn))
    history = {k: v.expand(-1, 2, *v.shape[2:]) if isinstance(v, torch.Tensor) else v for k, v in one.items()}
    conditioning = adapter.observe(history)
    chosen = steered.actor.act(adapter.features(conditioning).float(), drawn, True)
    ours = adapter.postprocess(adapter.denoise(conditioning, chosen), conditioning)[:, 0]
    assert (theirs - ours).abs().max() <= 1e-6

    def shift(weights):
        weights["unnormalize_outputs.buffer_action.min"] -= 0.1

    before = file_hash(old)
    edit_weights(old, shift)
    assert file_hash(old) != before
    with pytest.raises(UserError, match=r"its weights have another hash"):
        load_artefact(PolicyConfig(path=str(folder), device="cpu"))


def rename(old_part, new_part):
    def edit(weights):
        for name in [name for name in weights if old_part in name]:
            weights[name.replace(old_part, new_part)] = weights.pop(name)

    return edit


def test_a_marker_of_the_dataset_in_the_buffers_names(old):
    """SmolVLA's base model has one set of buffers for each of its datasets."""
    expected = load(old)
    observation = expected.example_observation(2, torch.Generator().manual_seed(3))
    edit_weights(old, rename(".buffer_", ".so100-red_buffer_"))
    assert torch.equal(actions(load(old), observation), actions(expected, observation))

    def another(weights):
        for name in [name for name in weights if "so100-red_buffer" in name]:
            weights[name.replace("red", "blue")] = weights[name] + 1

    edit_weights(old, another)
    with pytest.raises(UserError, match=r"several statistics of .* that differ"):
        load(old)


def test_statistics_of_the_targets_alone(old):
    def drop(weights):
        for name in [name for name in weights if name.startswith("unnormalize_outputs")]:
            del weights[name]

    expected = load(old)
    observation = expected.example_observation(2, torch.Generator().manual_seed(3))
    edit_weights(old, drop)
    assert torch.equal(actions(load(old), observation), actions(expected, observation))


def never_filled(weights):
    weights["normalize_inputs.buffer_observation_state.min"].fill_(float("inf"))


def forget_camera(weights):
    for name in [name for name in weights if "buffer_observation_images_cam_high" in name]:
        del weights[name]


def forget_all(weights):
    for name in [name for name in weights if "buffer_" in name]:
        del weights[name]


REFUSED = {
    "never filled": (never_filled, "normalises 'observation.state' by MIN_MAX but has no finite min of it"),
    "a camera without": (
        forget_camera,
        "'observation.images.cam_high' by MEAN_STD .* there are statistics of",
    ),
    "none": (forget_all, "lacks policy_preprocessor.json, policy_postprocessor.json .* holds none there"),
    "of another camera": (
        rename("cam_high", "cam_low"),
        "buffer_observation_images_cam_low.* belongs to none of the features in config.json",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, old):
    edit, message = REFUSED[name]
    edit_weights(old, edit)
    with pytest.raises(UserError, match=message) as caught:
        load(old)
    assert "\n" not in str(caught.value)


def test_names_that_differ_by_an_underscore_alone(old):
    path = old / "config.json"
    config = json.loads(path.read_text())
    features = config["input_features"]
    features["observation.images_cam.high"] = features["observation.images.cam_high"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"cam_high and observation.images_cam.high of the features"):
        load(old)
