"""The probe's measurements against a function whose dependence on noise is known."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.point import STEPS, PointAdapter
from trimtab.adapters.base import NoiseSpec
from trimtab.adapters.steerability import denoise_all, measure


@pytest.fixture
def adapter():
    return PointAdapter()


def observations(adapter, count=3):
    generator = torch.Generator().manual_seed(5)
    return [adapter.example_conditioning(1, generator) for _ in range(count)]


def test_point_policy(adapter):
    found = measure(adapter, observations(adapter), noises=64, repeats=1, again=lambda: None)
    assert found.deterministic and found.finite and not found.blind
    assert found.spread.shape == (STEPS, 1)
    # Row t of the noise moves step t of the chunk and no other.
    assert found.row_effect.shape == (STEPS, STEPS)
    assert (found.row_effect.diagonal() > 0.1).all()
    assert (found.row_effect - torch.diag(found.row_effect.diagonal()) == 0).all()
    assert found.column_effect.shape == (1,) and found.inert_columns == []
    assert set(found.seconds) == {"encode", "denoise_1", "denoise_16"}
    assert 0.9 < found.authority <= 1.0 + 1e-6  # the observation only scales the noise


def test_spread_is_the_standard_deviation_over_noises(adapter):
    single = observations(adapter, 1)
    found = measure(adapter, single, noises=32, seed=3, repeats=0)
    noises = torch.randn((32, STEPS, 1), generator=torch.Generator().manual_seed(3))
    chunks = torch.cat([adapter.denoise(single[0], noise[None]) for noise in noises])
    assert torch.allclose(found.spread, chunks.std(0, correction=0), atol=1e-6)


def test_authority_is_the_share_of_the_noise(adapter):
    """Add an offset by observation whose variance is known: authority = sd(noise) / sd(total)."""

    class Offset(PointAdapter):
        def denoise(self, conditioning, noise):
            return 0.5 * noise + 2.0 * conditioning.rows("sign")[:, None, None]

    offset = Offset()
    rows = [
        replace(c, tensors={**c.tensors, "sign": torch.tensor([1.0 if i % 2 else -1.0])})
        for i, c in enumerate(observations(adapter, 4))
    ]
    found = measure(offset, rows, noises=4000, repeats=0)
    assert found.authority == pytest.approx(0.5 / (0.25 + 4.0) ** 0.5, rel=0.02)


def test_inert_entries_are_found(adapter):
    class Masked(PointAdapter):
        def __init__(self):
            super().__init__()
            live = torch.ones(STEPS, 3, dtype=torch.bool)
            live[:, 2] = False
            self.noise_spec = NoiseSpec((STEPS, 3), live=live)

        def denoise(self, conditioning, noise):
            mixed = noise @ torch.tensor([[2.0], [0.0], [0.0]])
            return mixed + 1e-9 * torch.arange(len(noise)).view(-1, 1, 1)  # rounding by place in the batch

    found = measure(Masked(), observations(adapter), repeats=0)
    assert found.inert_columns == [1, 2]  # column 1 is inert although nothing says so
    assert found.declared_inert == STEPS and found.inert_difference <= found.floor


def test_a_sampler_that_draws_and_one_that_ignores(adapter):
    class Draws(PointAdapter):
        def denoise(self, conditioning, noise):
            return super().denoise(conditioning, noise) + 0.1 * torch.randn(len(noise), 1, 1)

    class Ignores(PointAdapter):
        def denoise(self, conditioning, noise):
            return super().denoise(conditioning, torch.zeros_like(noise))

    assert not measure(Draws(), observations(adapter), repeats=0).deterministic
    for count in (1, 3):
        blind = measure(Ignores(), observations(adapter, count), repeats=0)
        assert blind.deterministic and blind.blind


def test_batches_respect_the_policy(adapter):
    class OneByOne(PointAdapter):
        max_batch = 1

        def denoise(self, conditioning, noise):
            assert len(noise) == 1
            return super().denoise(conditioning, noise)

    noises = torch.randn(5, STEPS, 1)
    one = observations(adapter, 1)[0]
    assert torch.equal(denoise_all(OneByOne(), one, noises), denoise_all(adapter, one, noises))
