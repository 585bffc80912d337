"""From an environment's observations to what it executes, on a device of either kind."""

import numpy as np
import pytest
import torch

from tests.helpers.lane import LaneConfig, LaneEnv, make_lane_policy
from trimtab.adapters import PolicyConfig, load_adapter
from trimtab.rl.envs.chunk import ChunkEnv
from trimtab.rl.runner import PolicyRunner, to_device

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))


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
