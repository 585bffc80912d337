"""Chunks back into the noise that makes them: by hand, and on policies that were trained a little."""

import json
import shutil

import pytest
import torch
from pyarrow.parquet import read_table

from tests.conftest import make_diffusion
from tests.helpers.tiny import make_tiny
from trimtab.adapters import PolicyConfig, load_adapter
from trimtab.adapters.lerobot.inversion import reverse_euler
from trimtab.policies.acting import noise_of
from trimtab.policies.noise_space import FullNoiseConfig, RepeatNoiseConfig


def draws(adapter, count, seed=1):
    return torch.randn(count, *adapter.noise_spec.shape, generator=torch.Generator().manual_seed(seed))


def states(adapter, count):
    return adapter.example_conditioning(count, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(drawer_base, tmp_path_factory):
    """A policy cloned for 300 steps that executes its whole chunk, and 48 states that it was cloned from."""
    folder = shutil.copytree(drawer_base, tmp_path_factory.mktemp("invert") / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_action_steps": config["horizon"]}))
    adapter = load_adapter(PolicyConfig(path=str(folder), device="cpu", num_inference_steps=5))
    (file,) = (drawer_base / "demonstrations" / "data").rglob("*.parquet")
    columns = read_table(file, columns=list(adapter.config.input_features)).to_pydict()
    rows = {name: torch.tensor(values)[:, None] for name, values in columns.items()}
    some = torch.linspace(0, len(next(iter(rows.values()))) - 1, 48).long()
    return adapter, adapter.observe({name: value[some] for name, value in rows.items()} | {"task": [""] * 48})


def test_euler_steps_by_hand():
    """Of v = -x t: y = x + h v = x (1 + t / N). Picard's first step is x := y - y t / N, then secants."""
    y, seen = torch.tensor([[1.0], [-2.0]]), []

    def velocity(x, time):
        seen.append(time.tolist())
        return -x * time[:, None]

    assert torch.allclose(reverse_euler(velocity, y, 2, 1), y * 0.75 * 0.5)
    assert seen == [[0.5, 0.5], [1.0, 1.0]]
    assert torch.allclose(reverse_euler(velocity, y, 2, 2), y / 1.25 / 1.5)


def test_a_ddim_step_by_hand(tmp_path):
    folder = make_diffusion(tmp_path / "base", num_inference_steps=1, clip_sample=False)
    adapter = load_adapter(PolicyConfig(path=str(folder), device="cpu"))
    assert adapter.config.prediction_type == "epsilon"
    conditioning, sample = states(adapter, 3), adapter.policy.diffusion.conditional_sample
    seen = conditioning.rows("features")
    with torch.no_grad():
        y = sample(3, global_cond=seen, noise=torch.zeros(3, *adapter.noise_spec.shape))
    chunk = 0.3 * torch.randn(3, *adapter.chunk_shape, generator=torch.Generator().manual_seed(2))
    first = adapter.n_obs_steps - 1
    y[:, first : first + adapter.chunk_shape[0]] = chunk
    scheduler = adapter.policy.diffusion.noise_scheduler
    scheduler.set_timesteps(1)
    (t,) = scheduler.timesteps
    alpha = scheduler.alphas_cumprod[t]
    with torch.no_grad():
        eps = adapter.policy.diffusion.unet(y, torch.full((3,), t), global_cond=seen)
    forward = (y - (1 - alpha).sqrt() * eps) / alpha.sqrt()  # to alpha = 1: the predicted x_0
    expected = y + (y - forward) * alpha.sqrt()
    assert torch.allclose(adapter.invert(conditioning, chunk, 1)[0], expected, atol=1e-5)


def test_the_miss_is_in_units_of_what_noise_does(trained):
    adapter, seen = trained
    conditioning, noise = seen[:2], draws(adapter, 2)
    chunk = adapter.denoise(conditioning, noise)
    several = draws(adapter, 8, seed=0)
    sigma = [adapter.denoise(conditioning[[row] * 8], several).var(0).mean().sqrt() for row in range(2)]
    assert adapter.misses(conditioning, noise, chunk).max() < 1e-4
    far = adapter.misses(conditioning, noise, chunk + 0.02)
    assert torch.allclose(far, 0.02 / torch.stack(sigma), rtol=1e-3)


def test_a_trained_policy_tells_the_noise_of_its_own_chunks(trained):
    adapter, conditioning = trained
    chunk, median = adapter.denoise(conditioning, draws(adapter, 48)), {}
    for iterations in (1, 2, 5):
        noise, miss = adapter.invert(conditioning, chunk, iterations)
        assert torch.allclose(adapter.misses(conditioning, noise, chunk), miss)
        median[iterations] = float(miss.median())
    assert median[1] > 1.5 * median[2] > 3.0 * median[5], median
    assert (miss < 0.1).float().mean() > 0.5


@pytest.mark.parametrize("kind", ["smolvla", "pi0", "eo1"])
def test_flows_tell_the_noise_of_their_own_chunks(kind, tmp_path):
    adapter = load_adapter(make_tiny(kind, tmp_path / "policy"))
    conditioning = states(adapter, 3)
    chunk = adapter.denoise(conditioning, draws(adapter, 3))
    once, often = (adapter.invert(conditioning, chunk, count)[1] for count in (1, 5))
    assert often.max() < 0.1 and (often < once).all(), (once, often)


def test_what_cannot_be_run_backwards_says_so(tmp_path):
    for adapter in (load_adapter(make_tiny(kind, tmp_path / kind)) for kind in ("act", "multi_task_dit")):
        conditioning = states(adapter, 1)
        chunk = adapter.denoise(conditioning, draws(adapter, 1))
        assert not adapter.inverts and adapter.invert(conditioning, chunk) is None


def test_a_noise_counts_where_the_space_can_say_it(trained):
    """An actor's mean makes the chunk again; of repeated noise, and of a far chunk, none does."""
    adapter, conditioning = trained
    spec, found = adapter.noise_spec, []
    full, repeat = (config.build(spec) for config in (FullNoiseConfig(), RepeatNoiseConfig()))
    chunks = adapter.denoise(conditioning, draws(adapter, 48).clamp(-1.5, 1.5))
    for row in range(0, 48, 4):
        one, chunk = conditioning[row], chunks[row : row + 1]
        u = noise_of(adapter, full, one, chunk)
        assert noise_of(adapter, repeat, one, chunk) is None
        assert noise_of(adapter, full, one, chunk + 1.0) is None
        if u is not None:
            said = full.expand(u[None], torch.zeros(1, *spec.shape))
            assert said.abs().max() <= 1.96 and adapter.misses(one, said, chunk) < 0.1
            found.append(row)
    assert len(found) >= 4
