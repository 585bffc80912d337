"""From an environment's observations to what it executes, on a device of either kind."""

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import LiberoEnv

from tests.helpers.lane import LaneConfig, LaneEnv, make_lane_policy
from tests.helpers.tiny import make_tiny
from trimtab.adapters import PolicyConfig, load_adapter
from trimtab.rl.envs.chunk import ChunkEnv
from trimtab.rl.runner import PolicyRunner, to_device

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))


def test_xvla_looks_and_acts_in_libero(tmp_path):
    """LeRobot's own steps around it: images by ImageNet's statistics, rotations one action at a time."""
    image, state = PolicyFeature(FeatureType.VISUAL, (3, 64, 64)), PolicyFeature(FeatureType.STATE, (20,))
    inputs = {f"observation.images.{name}": image for name in ("image", "image2")}
    make_tiny(
        *("xvla", tmp_path / "base"),
        input_features={"observation.state": state, **inputs},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (20,))},
        action_mode="ee6d",
    )
    adapter = load_adapter(PolicyConfig(path=str(tmp_path / "base"), device="cpu"))
    steps = adapter.preprocessor.steps  # those for images are LIBERO's own here
    adapter.preprocessor.steps = [step for step in steps if "Image" not in type(step).__name__]
    runner, draw = PolicyRunner(adapter, LiberoEnv()), np.random.default_rng(0)
    seen = {
        "pixels": {name: draw.integers(0, 255, (1, 64, 64, 3), np.uint8) for name in ("image", "image2")},
        "robot_state": {
            "eef": {"pos": np.zeros((1, 3)), "quat": np.ones((1, 4)) / 2, "mat": np.eye(3)[None]},
            "gripper": {"qpos": np.zeros((1, 2)), "qvel": np.zeros((1, 2))},
            "joints": {"pos": np.zeros((1, 7)), "vel": np.zeros((1, 7))},
        },
    }
    encoded = runner.encode([seen, seen], ["open the drawer"] * 2)
    actions = runner.decode(encoded, runner.prior(2, torch.Generator().manual_seed(0)))
    assert np.stack(actions).shape == (2, adapter.chunk_shape[0], 7) and not (actions[0] == actions[1]).all()
    chunk = adapter.denoise(encoded, torch.zeros(2, *adapter.noise_spec.shape))
    one = runner.env_postprocessor({"action": adapter.postprocess(chunk, encoded)[:, 1]})["action"]
    assert np.allclose(runner.executable(chunk, encoded)[:, 1], one.numpy(), atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_device_acts_as_the_host_does(device, tmp_path):
    """What goes to a GPU lies in pinned memory, from which it is copied while the host goes on."""
    folder = make_lane_policy(tmp_path / "base")
    made = []
    for where in ("cpu", device):
        runner = PolicyRunner(load_adapter(PolicyConfig(path=str(folder), device=where)), LaneConfig())
        seen = [ChunkEnv(LaneEnv(), runner.adapter.n_obs_steps).reset(seed) for seed in (3, 4)]
        history = runner.history(seen, ["", ""])
        tensors = [value for value in history.values() if isinstance(value, torch.Tensor)]
        assert tensors and all(value.is_pinned() == (where == "cuda") for value in tensors)
        prior = runner.prior(2, torch.Generator().manual_seed(0))
        assert torch.equal(to_device(prior, runner.adapter.device).cpu(), prior)
        made.append(np.stack(runner.decode(runner.adapter.observe(history), prior)))
    np.testing.assert_allclose(*made, atol=1e-4)
