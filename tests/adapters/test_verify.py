"""What ``verify`` must see through, on a real policy whose adapter has one defect each."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import make_diffusion
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.lerobot.diffusion import DiffusionAdapter
from trimtab.adapters.loading import open_adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return load_adapter(PolicyConfig(path=str(make_diffusion(tmp_path_factory.mktemp("p"))), device="cpu"))


def broken(adapter, **methods):
    cls = type("Broken", (DiffusionAdapter,), methods)
    return cls(adapter.policy, adapter.preprocessor, adapter.postprocessor)


def sound(self, conditioning, noise):
    return DiffusionAdapter.denoise(self, conditioning, noise)


def draws_while_looking(self, batch):
    found = DiffusionAdapter.encode(self, batch)
    found.tensors["features"] = found.tensors["features"] + 0.1 * torch.randn_like(found.tensors["features"])
    return found


def swaps_rows(self, conditioning, noise):
    return sound(self, conditioning, noise.flip(0))


def half_blind(self, conditioning, noise):
    noise = noise.clone()
    noise[1:] = 0.0
    return sound(self, conditioning, noise)


def second_row_sees_the_first(self, conditioning, noise):
    noise = noise.clone()
    noise[1:] += 0.5 * noise[0]
    return sound(self, conditioning, noise)


def rounds(self, conditioning, noise):
    return sound(self, conditioning, torch.zeros_like(noise)) + 1e-8 * noise[:, :3]


def nan_sometimes(self, conditioning, noise):
    return sound(self, conditioning, noise) / (noise[:, :1, :1] < 1.0)


def second_row_hears_the_first(self, conditioning, noise):
    noise = noise.clone()
    noise[1:] = (noise[1:] + noise[:-1]) / 2**0.5
    return sound(self, conditioning, noise)


def first_row_hears_the_second(self, conditioning, noise):
    noise = noise.clone()
    noise[:-1] = (noise[1:] + noise[:-1]) / 2**0.5
    return sound(self, conditioning, noise)


def one_step_less(self, conditioning, noise):
    return sound(self, conditioning, noise)[:, :-1]


def one_dimension_less(self, conditioning, noise):
    return sound(self, conditioning, noise)[..., :-1]


def longer_alone(self, conditioning, noise):
    chunk = sound(self, conditioning, noise)
    return chunk if len(noise) > 1 else torch.cat([chunk, chunk[:, :1]], 1)


def integers(self, conditioning, noise):
    return (100 * sound(self, conditioning, noise)).long()


def flat_features(self, conditioning):
    return DiffusionAdapter.features(self, conditioning).flatten()


def nan_features(self, conditioning):
    return DiffusionAdapter.features(self, conditioning) * float("nan")


def longer_history(self, batch):
    found = DiffusionAdapter.encode(self, batch)
    found.tensors["features"] = found.tensors["features"].repeat(2, 1)
    return found


DEFECTS = {
    "draws while it looks": ({"encode": draws_while_looking}, UserError, "encoded twice"),
    "swaps rows": ({"denoise": swaps_rows}, RuntimeError, "mixes the rows"),
    "second row mixes": ({"denoise": second_row_hears_the_first}, RuntimeError, "mixes the rows"),
    "first row mixes": ({"denoise": first_row_hears_the_second}, RuntimeError, "mixes the rows"),
    "a step less": ({"denoise": one_step_less}, UserError, r"shape \(2, 2, 2\), .* declare \(2, 3, 2\)"),
    "an action's number less": (
        {"denoise": one_dimension_less},
        UserError,
        r"shape \(2, 3, 1\), .* \(2, 3, 2\)",
    ),
    "longer for one row": (
        {"denoise": longer_alone},
        UserError,
        r"shape \(1, 4, 2\), .* declare \(1, 3, 2\)",
    ),
    "integers": ({"denoise": integers}, UserError, "NaN or Inf"),
    "features without rows": ({"features": flat_features}, UserError, r"features have shape .* not \(2, d\)"),
    "features are NaN": ({"features": nan_features}, UserError, "features are NaN"),
    "more rows than observations": ({"encode": longer_history}, UserError, "of 2 observations .* made 4"),
    "second row sees the first": ({"denoise": second_row_sees_the_first}, RuntimeError, "mixes the rows"),
    "second row is blind": ({"denoise": half_blind}, UserError, "ignores its noise"),
    "blind but for rounding": ({"denoise": rounds}, UserError, "ignores its noise"),
    "NaN for some noise": ({"denoise": nan_sometimes}, UserError, "NaN or Inf"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_seen(adapter, name):
    methods, error, message = DEFECTS[name]
    with pytest.raises(error, match=message):
        broken(adapter, **methods).verify()


def test_broken_statistics_are_seen(adapter):
    wrong = broken(adapter)
    wrong.postprocessor = lambda chunk: chunk * float("nan")
    with pytest.raises(UserError, match="statistics are broken"):
        wrong.verify()


def test_actions_of_another_shape_are_seen(adapter):
    wrong = broken(adapter)
    wrong.postprocessor = lambda chunk: chunk[..., :1]
    with pytest.raises(UserError, match=r"actions of shape \(2, 3, 1\), config.json declares \(2, 3, 2\)"):
        wrong.verify()
    wrong.postprocessor = lambda chunk: chunk if len(chunk) > 3 else chunk[:, :1]  # of one row alone
    with pytest.raises(UserError, match=r"actions of shape \(1, 3, 1\), config.json declares \(1, 3, 2\)"):
        wrong.verify()


def test_a_postprocessor_gets_one_step_at_a_time(adapter):
    """As in LeRobot's loops, where `[:, -1]` is the gripper and not the last step."""
    own = broken(adapter)
    own.postprocessor = lambda action: torch.cat([action[:, :-1], action[:, -1:].sign()], 1)
    own.verify()
    chunk = torch.randn(2, 3, 2)
    assert torch.equal(own.postprocess(chunk), torch.cat([chunk[..., :1], chunk[..., 1:].sign()], -1))
    last = []

    def smoothed(action):
        last.append(action if not last else 0.5 * (action + last[-1]))
        return last[-1]

    own.postprocessor = smoothed
    with pytest.raises(UserError, match="another value after other actions: it remembers"):
        own.verify()


def test_entries_that_are_declared_inert_but_live(adapter):
    wrong = broken(adapter)
    live = torch.ones(wrong.noise_spec.shape, dtype=torch.bool)
    live[-1, -1] = False  # one of sixteen
    wrong.noise_spec = replace(wrong.noise_spec, live=live)
    with pytest.raises(UserError, match="declares inert move its chunks"):
        wrong.verify()


def test_nothing_executed_is_refused(adapter):
    wrong = broken(adapter)
    wrong.chunk_shape = (0, 2)
    with pytest.raises(UserError, match="executes 0 actions"):
        wrong.verify()


def test_sound_adapter_passes(adapter):
    broken(adapter).verify()


def test_a_policy_that_loads_but_does_not_run(tmp_path):
    folder = make_diffusion(tmp_path / "p")
    with pytest.raises(UserError, match=r"--policy.dtype: this diffusion policy runs in float32"):
        open_adapter(PolicyConfig(path=str(folder), device="cpu", dtype="bfloat16"))
