"""What ``verify`` must see through, on a real policy whose adapter has one defect each."""

import pytest
import torch

from tests.conftest import make_diffusion
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.diffusion import DiffusionAdapter
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
    found.tensors["global"] = found.tensors["global"] + 0.1 * torch.randn_like(found.tensors["global"])
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


DEFECTS = {
    "draws while it looks": ({"encode": draws_while_looking}, UserError, "encoded twice"),
    "swaps rows": ({"denoise": swaps_rows}, RuntimeError, "mixes the rows"),
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


def test_sound_adapter_passes(adapter):
    broken(adapter).verify()


def test_a_policy_that_loads_but_does_not_run(tmp_path):
    folder = make_diffusion(tmp_path / "p")
    with pytest.raises(UserError, match=r"--policy.dtype: a diffusion policy runs in float32"):
        open_adapter(PolicyConfig(path=str(folder), device="cpu", dtype="bfloat16"))
