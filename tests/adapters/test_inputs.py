"""What a policy was trained on against what an environment offers; how much of a chunk is executed."""

import json
import re

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.utils import validate_visual_features_consistency

from tests.conftest import make_diffusion
from tests.helpers.tiny import make_tiny
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.inputs import input_notes
from trimtab.adapters.tiny.parts import camera_features

FRONT, LEFT, RIGHT = (f"observation.images.{name}" for name in ("front", "camera1", "camera2"))
STATE = "observation.state"


@pytest.fixture(scope="module")
def two_cameras(tmp_path_factory):
    """A SmolVLA that was trained on camera1 and camera2, and does with one of them."""
    options = make_tiny("smolvla", tmp_path_factory.mktemp("two") / "policy", **camera_features(2))
    return options, load_adapter(options)


def renamed(policy, renames):
    adapter = policy[1]
    for step in adapter.preprocessor.steps:
        if hasattr(step, "rename_map"):
            step.rename_map = renames
    return adapter


@pytest.fixture
def adapter(two_cameras):
    yield two_cameras[1]
    renamed(two_cameras, {})


def observation(adapter, *cameras, count=2, task="pick up the red cube"):
    made = {name: torch.rand(count, 1, 3, 64, 64) for name in cameras}
    width = adapter.config.input_features[STATE].shape[0]
    return {**made, STATE: torch.rand(count, 1, width), "task": [task] * count}


CAMERAS = {  # what the environment gives: (runs here, runs in LeRobot)
    (LEFT, RIGHT): True,
    (LEFT,): True,
    (RIGHT,): True,
    (LEFT, RIGHT, FRONT): True,
    (LEFT, FRONT): False,
    (FRONT,): False,
    ("observation.image",): False,
}


@pytest.mark.parametrize("cameras", CAMERAS, ids=lambda names: "+".join(n.split(".")[-1] for n in names))
def test_cameras_are_compared_as_sets_by_lerobots_rule(adapter, cameras):
    feature = PolicyFeature(FeatureType.VISUAL, (3, 64, 64))
    theirs = {name: feature for name in cameras}
    if not CAMERAS[cameras]:
        with pytest.raises(ValueError, match="Feature mismatch"):
            validate_visual_features_consistency(adapter.config, theirs)
        with pytest.raises(UserError) as caught:
            adapter.observe(observation(adapter, *cameras))
        text = str(caught.value)
        assert text.startswith("--env.type") and "--policy.rename_map" in text
        assert all(name in text for name in (*cameras, LEFT, RIGHT)), "both lists are named"
        return
    validate_visual_features_consistency(adapter.config, theirs)
    seen = observation(adapter, *cameras)
    adapter.observe(seen)
    notes = " ".join(input_notes(adapter, seen))
    for name in (LEFT, RIGHT):
        assert (f"gives no {name}" in notes) == (name not in cameras)
    assert (f"also gives {FRONT}" in notes) == (FRONT in cameras)


def test_no_camera_at_all(adapter):
    with pytest.raises(UserError, match=r"the policy needs observation\.images\.camera1, .*camera2: "):
        adapter.observe(observation(adapter))


def test_the_renaming_that_is_suggested_works(adapter, two_cameras):
    seen = observation(adapter, LEFT, FRONT)
    with pytest.raises(
        UserError, match=r'rename_map=\'\{"observation.images.front": "observation.images.cam'
    ):
        adapter.observe(seen)
    renamed(two_cameras, {FRONT: RIGHT})
    found = adapter.observe(seen)
    renamed(two_cameras, {})
    plain = adapter.observe({LEFT: seen[LEFT], RIGHT: seen[FRONT], STATE: seen[STATE], "task": seen["task"]})
    assert torch.equal(adapter.features(found), adapter.features(plain))


def test_which_of_two_vectors_is_meant_is_not_guessed(tmp_path):
    folder = make_diffusion(tmp_path / "policy", state_dim=2, env_dim=2, n_obs_steps=1)
    adapter = load_adapter(PolicyConfig(path=str(folder), device="cpu"))
    seen = {f"observation.{name}": torch.rand(1, 1, 2) for name in ("qpos", "target")}
    with pytest.raises(UserError, match=r"rename with --policy\.rename_map$"):
        adapter.observe(seen)
    wide = {"observation.qpos": torch.rand(1, 1, 3), "observation.environment_state": torch.rand(1, 1, 2)}
    with pytest.raises(UserError, match=r"rename with --policy\.rename_map$"):
        adapter.observe(wide)  # of another length
    found = suggested(adapter, {"observation.qpos": torch.rand(1, 1, 2), **dict([wide.popitem()])})
    assert found == {"observation.qpos": STATE}


def suggested(adapter, seen):
    with pytest.raises(UserError) as caught:
        adapter.observe(seen)
    return json.loads(re.search(r"rename_map='(\{.*?\})'", str(caught.value))[1])


def test_the_suggested_renaming_goes_by_the_names(adapter, two_cameras):
    """Not by their order: two cameras the wrong way round would run, with exit code 0."""
    seen = observation(adapter, LEFT, RIGHT)
    seen["observation.images.a_second_camera2"] = seen.pop(RIGHT)
    seen["observation.images.the_camera1"] = seen.pop(LEFT)
    assert suggested(adapter, seen) == {
        "observation.images.a_second_camera2": RIGHT,
        "observation.images.the_camera1": LEFT,
    }


def test_the_suggested_renaming_keeps_the_checkpoints_own(adapter, two_cameras):
    """What the user gives takes its place."""
    renamed(two_cameras, {FRONT: LEFT})
    seen = observation(adapter, FRONT)
    seen["observation.images.side"] = seen[FRONT]
    try:
        found = suggested(adapter, seen)
        assert found == {FRONT: LEFT, "observation.images.side": RIGHT}
        renamed(two_cameras, found)
        adapter.observe(seen)
    finally:
        renamed(two_cameras, {})


def test_a_renaming_of_nothing_or_of_two_to_one(adapter, two_cameras):
    renamed(two_cameras, {"observation.images.frnt": LEFT})
    seen = observation(adapter, RIGHT)
    assert any("names observation.images.frnt, which" in note for note in input_notes(adapter, seen))
    renamed(two_cameras, {FRONT: LEFT})
    with pytest.raises(UserError, match=r"--policy.rename_map: gives observation.images.camera1 to two"):
        adapter.observe(observation(adapter, LEFT, RIGHT, FRONT))


def test_no_instruction_is_said(adapter):
    notes = input_notes(adapter, observation(adapter, LEFT, RIGHT, task=""))
    assert len(notes) == 1 and "reads an instruction, and the environment gives none" in notes[0]
    assert input_notes(adapter, observation(adapter, LEFT, RIGHT)) == []


BAD = {
    "state of another width": (
        {STATE: torch.rand(2, 1, 6)},
        r"state of shape \(5,\), the environment gives \(6",
    ),
    "channels last": ({LEFT: torch.rand(2, 1, 64, 64, 3)}, "as .height, width, channels.* channels first"),
    "one channel": (
        {LEFT: torch.rand(2, 1, 1, 64, 64)},
        r"camera1 of shape \(3, 64, 64\), .* gives \(1, 64, 64",
    ),
    "bytes": (
        {LEFT: torch.full((2, 1, 3, 64, 64), 200, dtype=torch.uint8)},
        "uint8 up to 200; .* from 0 to 1",
    ),
    "up to 255": ({LEFT: torch.full((2, 1, 3, 64, 64), 255.0)}, "float32 up to 255; .* from 0 to 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_values_that_no_policy_was_trained_on(adapter, case):
    changed, message = BAD[case]
    with pytest.raises(UserError, match=message):
        adapter.observe(observation(adapter, LEFT, RIGHT) | changed)


def test_a_policy_that_needs_all_its_cameras(tmp_path):
    adapter = load_adapter(make_tiny("act", tmp_path / "policy", **camera_features(2)))
    with pytest.raises(UserError, match=r"the policy needs observation.images.camera2: .* gives observation"):
        adapter.observe(observation(adapter, LEFT))


def test_a_policy_that_looks_at_every_camera(tmp_path):
    """LeRobot's fastwam puts all cameras of a batch side by side: a further one would shrink its own."""
    adapter = load_adapter(make_tiny("fastwam", tmp_path / "policy"))
    own = [key for key in adapter.config.input_features if "image" in key]
    seen = adapter.example_observation(1, torch.Generator().manual_seed(0))
    adapter.observe(dict(seen))
    with pytest.raises(UserError, match=r"every camera there is, also at observation.images.front"):
        adapter.observe({**seen, FRONT: seen[own[0]]})


# Images of another size.

RESIZES = {
    "diffusion": ({"images": True}, {"resize_shape": (48, 48)}, {"crop_shape": (48, 48)}),
    "multi_task_dit": ({}, {"image_resize_shape": (64, 64)}, {}),
}


@pytest.mark.parametrize("policy_type", RESIZES)
def test_images_of_any_size_where_the_policy_resizes_them(policy_type, tmp_path):
    common, resizing, fixed = RESIZES[policy_type]
    for name, fields, fits in (("resizes", resizing, True), ("fixed", fixed, False)):
        adapter = load_adapter(make_tiny(policy_type, tmp_path / name, **common, **fields))
        assert adapter.resizes_images == fits
        seen = adapter.example_observation(2, torch.Generator().manual_seed(0))
        steps = adapter.n_obs_steps
        cameras = [key for key in seen if "image" in key]
        large = seen | {key: torch.rand(2, steps, 3, 96, 80) for key in cameras}
        if not fits:
            with pytest.raises(UserError, match=r"gives \(3, 96, 80\) and does not resize its images"):
                adapter.observe(large)
            continue
        noise = torch.randn(2, *adapter.noise_spec.shape)
        found = adapter.denoise(adapter.observe(large), noise)
        assert not torch.equal(found, adapter.denoise(adapter.observe(seen), noise))
        if policy_type == "diffusion":  # as LeRobot acts
            policy = adapter.policy
            policy.reset()
            batch = adapter.preprocessor({k: v[:, -1] for k, v in large.items() if k != "task"})
            still = {k: v[:, -1:].expand_as(v) if k != "task" else v for k, v in large.items()}
            theirs = policy.select_action(batch, noise=noise)
            ours = adapter.denoise(adapter.observe(still), noise)[:, 0]
            assert (theirs - ours).abs().max() <= 1e-6


def test_stacked_cameras_must_be_of_one_size(tmp_path):
    fields = camera_features(2)
    adapter = load_adapter(make_tiny("diffusion", tmp_path / "policy", resize_shape=(48, 48), **fields))
    seen = adapter.example_observation(2, torch.Generator().manual_seed(0))
    seen[LEFT] = torch.rand(2, 2, 3, 96, 80)
    with pytest.raises(UserError, match=r"cameras of one size, the environment gives .*camera1 96 x 80"):
        adapter.observe(seen)


# Actions of a chunk.


@pytest.mark.parametrize(
    "policy_type, seen, horizon, asked, steps",
    [
        ("diffusion", 2, 8, 8, 7),
        ("diffusion", 3, 8, 8, 6),
        ("diffusion", 1, 8, 8, 8),
        ("multi_task_dit", 2, 8, 8, 7),
        ("multi_task_dit", 3, 8, 7, 6),
    ],
)
def test_executes_as_much_of_a_chunk_as_lerobot(tmp_path, policy_type, seen, horizon, asked, steps):
    fields = {"n_obs_steps": seen, "horizon": horizon, "n_action_steps": asked}
    options = make_tiny(policy_type, tmp_path / "policy", **fields)
    adapter = load_adapter(options)
    assert adapter.chunk_shape[0] == steps
    assert any(
        f"n_action_steps {asked}" in note and f"{steps} actions" in note for note in adapter.notes
    ) == (asked != steps)
    policy = adapter.policy
    policy.reset()
    example = adapter.example_observation(2, torch.Generator().manual_seed(0))
    batch = adapter.preprocessor({k: v[:, 0] if torch.is_tensor(v) else v for k, v in example.items()})
    policy.select_action(dict(batch))
    queue = policy._queues["action"]
    assert len(queue) == steps - 1
    chunk = adapter.denoise(adapter.observe(example), torch.randn(2, *adapter.noise_spec.shape))
    assert chunk.shape == (2, *adapter.chunk_shape)
    with pytest.raises(
        UserError, match=f"--policy.n_action_steps: must be between 1 and {horizon - seen + 1}"
    ):
        load_adapter(PolicyConfig(**{**vars(options), "n_action_steps": horizon - seen + 2}))


def test_a_horizon_that_ends_before_the_present_is_refused(tmp_path):
    options = make_tiny("diffusion", tmp_path / "policy", n_obs_steps=5, horizon=4, n_action_steps=4)
    with pytest.raises(UserError, match="of each chunk it executes 0 actions"):
        load_adapter(options)
