"""Noise spaces: shapes, bounds, and a start that samples like the base."""

from dataclasses import replace

import draccus
import pytest
import torch

from trimtab.adapters import NoiseSpec, UserError
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.noise_samplers import prior_noise
from trimtab.policies.noise_space import (
    ConstantNoiseConfig,
    FullNoiseConfig,
    KnotNoiseConfig,
    MaskedNoiseConfig,
    NoiseSpaceConfig,
    RepeatNoiseConfig,
    ResidualNoiseConfig,
)
from trimtab.policies.noise_space.spaces import knot_weights

STEPS, DIM = 6, 3
LIVE = torch.zeros(STEPS, DIM, dtype=torch.bool)
LIVE[:4, :2] = True
SPEC = NoiseSpec((STEPS, DIM), live=LIVE)

SPACES = {
    "full": (FullNoiseConfig(bound=1.7), 18),
    "repeat": (RepeatNoiseConfig(bound=1.7), 3),
    "one knot": (KnotNoiseConfig(bound=1.7, knots=1), 3),
    "knots": (KnotNoiseConfig(bound=1.7, knots=4), 12),
    "six knots": (KnotNoiseConfig(bound=1.7, knots=6), 18),
    "masked": (MaskedNoiseConfig(bound=1.7), 8),
    "masked rows": (MaskedNoiseConfig(bound=1.7, rows="0:2,3:", columns=":1"), 3),
    "residual": (ResidualNoiseConfig(bound=1.7), 3),
    "residual full": (ResidualNoiseConfig(bound=1.7, delta="full"), 18),
    "full, in the bound": (FullNoiseConfig(bound=1.7, unit="bound"), 18),
    "constant": (ConstantNoiseConfig(bound=1.7), 18),
    "constant repeat": (ConstantNoiseConfig(bound=1.7, ticket="repeat"), 3),
}


@pytest.fixture(params=SPACES)
def case(request):
    config, dim = SPACES[request.param]
    return config.build(SPEC), dim


def test_expand_and_project_are_inverse_within_the_bound(case):
    space, dim = case
    assert space.dim == dim
    u, prior = (torch.rand(5, dim) * 2 - 1) * space.bound, torch.randn(5, STEPS, DIM)
    before = prior.clone()
    noise = space.expand(u, prior)
    assert noise.shape == (5, STEPS, DIM) and noise.dtype == SPEC.dtype
    assert torch.allclose(space.project(noise, prior), u, atol=2e-6)
    assert torch.equal(prior, before)
    for other in (noise * 100, torch.randn(5, STEPS, DIM) * 100):  # whatever else was fed
        assert space.project(other, prior).shape == (5, dim)
        assert space.project(other, prior).abs().max() <= space.bound


def test_expand_hands_gradients_to_u(case):
    space, dim = case
    u = torch.zeros(2, dim, requires_grad=True)
    space.expand(u, torch.randn(2, STEPS, DIM)).sum().backward()
    assert (u.grad != 0).all()


def test_squash_is_bounded_and_nearly_the_identity_inside(case):
    space, _ = case
    z = torch.linspace(-50, 50, 1001, dtype=torch.float64)
    assert space.squash(z).abs().max() <= 1.7
    assert (space.scale * (space.squash(z / space.scale) - z / space.scale))[z.abs() < 0.3].abs().max() < 4e-3
    inner = z[z.abs() < 5]
    assert torch.allclose(space.unsquash(space.squash(inner)), inner)


def test_log_slope_is_the_derivative_of_squash(case):
    space, _ = case
    z = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(space.squash(z).sum(), z)
    assert torch.allclose(space.log_slope(z), slope.log(), atol=1e-9)
    assert torch.isfinite(space.log_slope(torch.tensor([400.0, -400.0]))).all()


@pytest.mark.parametrize("name", SPACES)
def test_the_unit_of_u(name):
    """In shares of the bound ``u`` stands for the same noise, up to the scale, and draws are the same."""
    torch.manual_seed(0)
    plain = replace(SPACES[name][0], unit="deviation").build(SPEC)
    scaled = replace(SPACES[name][0], unit="bound").build(SPEC)
    assert (scaled.bound, scaled.scale, plain.bound, plain.scale) == (1.0, 1.7, 1.7, 1.0)
    for fact in ("spec", "dim", "uses_features", "determines_noise"):
        assert getattr(scaled, fact) == getattr(plain, fact)
    u, prior = torch.rand(5, scaled.dim) * 2 - 1, torch.randn(5, STEPS, DIM)
    noise = scaled.expand(u, prior)
    assert torch.equal(noise, plain.expand(1.7 * u, prior))
    assert torch.allclose(1.7 * scaled.project(noise, prior), plain.project(noise, prior))
    assert torch.allclose(scaled.squash(u), torch.tanh(u))
    assert torch.equal(scaled.draw(prior), plain.draw(prior))
    assert torch.allclose(prior_noise(scaled)(None, prior), prior_noise(plain)(None, prior), atol=1e-6)


# The start.

DRAWS = 40_000


def expected_correlation(name, space):
    """Of the rows of one column, at the start, in the unsquashed Gaussian limit."""
    if name in ("repeat", "constant repeat"):
        return torch.ones(STEPS, STEPS)
    if "knot" in name:
        return space.weights @ space.weights.T
    if name == "residual":
        shared = space.initial_std**2 / (1 + space.initial_std**2)
        return torch.full((STEPS, STEPS), shared).fill_diagonal_(1.0)
    return torch.eye(STEPS)


@pytest.mark.parametrize("name", SPACES)
def test_the_untrained_actor_draws_the_prior(name):
    """Each entry standard normal, independent between columns; rows as the space says; less the squash."""
    torch.manual_seed(0)
    config = type(SPACES[name][0])(**{**vars(SPACES[name][0]), "bound": 50.0})  # a squash that does nothing
    space = config.build(SPEC)
    actor = NoiseActor(5, space, ActorConfig(hidden=16, layers=2))
    features, prior = torch.randn(DRAWS, 5), torch.randn(DRAWS, STEPS, DIM)
    noise = actor.act(features, prior)
    assert torch.allclose(noise, prior_noise(space)(features, prior), atol=2e-4)
    assert noise.mean(0).abs().max() < 0.03
    assert (noise.var(0) - 1.0 - (space.initial_std**2 if "residual" in name else 0.0)).abs().max() < 0.04
    for column in range(DIM):
        correlation = torch.corrcoef(noise[..., column].T)
        assert torch.allclose(correlation, expected_correlation(name, space), atol=0.03)
    assert torch.corrcoef(torch.stack([noise[:, 0, 0], noise[:, 0, 1]]))[0, 1].abs() < 0.03


@pytest.mark.parametrize("name", SPACES)
def test_what_the_squash_does_to_the_start(name):
    """At the default bound: deviation 0.83 of what is steered, 1 of the rest (rl/README.md)."""
    torch.manual_seed(0)
    default = {key: value for key, value in vars(SPACES[name][0]).items() if key != "bound"}
    space = type(SPACES[name][0])(**default).build(SPEC)
    prior = torch.randn(DRAWS, STEPS, DIM)
    std = prior_noise(space)(None, prior).std(0)
    expected = torch.full((STEPS, DIM), 0.83)
    if "masked" in name:
        expected[~space.steered] = 1.0
    if "residual" in name:
        expected.fill_(1.005)
    assert torch.allclose(std, expected, atol=0.015)


def test_the_actors_draw_is_standard_normal_and_unseen_by_what_is_added(case):
    space, dim = case
    prior = torch.randn(20_000, STEPS, DIM)
    draw = space.draw(prior)
    assert draw.shape == (20_000, dim)
    assert draw.mean().abs() < 0.01 and (draw.std() - 1).abs() < 0.01
    assert torch.equal(draw[:3], space.draw(prior[:3]))  # of its row alone
    rest = space.expand(torch.zeros(20_000, dim), prior).flatten(1)  # what is added to u, or stands beside it
    both = torch.corrcoef(torch.cat([draw, rest + 1e-9 * torch.randn_like(rest)], 1).T)
    assert both[:dim, dim:].abs().max() < 0.05


# One by one.


def test_repeat_is_the_same_at_every_step():
    noise = RepeatNoiseConfig().build(SPEC).expand(torch.randn(4, 3), torch.zeros(4, 6, 3))
    assert torch.equal(noise, noise[:, :1].expand_as(noise))


def test_knots_between_repeat_and_full():
    u, prior = torch.randn(4, 18), torch.randn(4, STEPS, DIM)
    one, every = (KnotNoiseConfig(knots=knots).build(SPEC) for knots in (1, STEPS))
    repeat, full = RepeatNoiseConfig().build(SPEC), FullNoiseConfig().build(SPEC)
    assert torch.equal(one.expand(u[:, :3], prior), repeat.expand(u[:, :3], prior))
    assert torch.equal(every.expand(u, prior), full.expand(u, prior))


def test_knot_weights():
    weights = knot_weights(3, 5)
    half = 0.5**0.5
    expected = [[1, 0, 0], [half, half, 0], [0, 1, 0], [0, half, half], [0, 0, 1]]
    assert torch.allclose(weights, torch.tensor(expected, dtype=torch.float64))
    for knots, steps in ((1, 1), (2, 50), (7, 50), (49, 50), (50, 50)):
        weights = knot_weights(knots, steps)
        assert torch.allclose(weights.norm(dim=1), torch.ones(steps, dtype=torch.float64))
        assert torch.linalg.matrix_rank(weights) == knots
        assert torch.linalg.cond(weights) < 10


def test_knots_project_other_noise_to_the_nearest():
    space = KnotNoiseConfig(bound=50.0, knots=3).build(SPEC)
    noise = torch.randn(1, STEPS, DIM)
    best = (space.expand(space.project(noise), noise) - noise).norm()
    for _ in range(20):
        other = space.project(noise) + 0.1 * torch.randn(1, 9)
        assert (space.expand(other, noise) - noise).norm() > best


def test_knots_reach_no_farther_than_documented():
    space = KnotNoiseConfig(bound=2.0, knots=4).build(SPEC)
    noise = space.expand(torch.full((1, 12), 2.0), torch.zeros(1, STEPS, DIM))
    assert 2.0 < noise.max() <= 2.0 * 2**0.5 + 1e-6


def test_masked_leaves_the_rest_to_the_prior():
    space = MaskedNoiseConfig().build(SPEC)
    prior = torch.randn(3, STEPS, DIM)
    noise = space.expand(torch.full((3, 8), 0.5), prior)
    assert (noise[:, LIVE] == 0.5).all()
    assert torch.equal(noise[:, ~LIVE], prior[:, ~LIVE])
    assert torch.equal(space.project(prior * 0.1), (prior * 0.1)[:, LIVE])


@pytest.mark.parametrize(
    "rows, columns, steered",
    [
        ("0:2", None, [[r, c] for r in (0, 1) for c in (0, 1, 2)]),
        (None, "01:2", [[r, 1] for r in range(6)]),
        ("4:,:1", "2:3", [[0, 2], [4, 2], [5, 2]]),
    ],
)
def test_masked_rows_and_columns(rows, columns, steered):
    space = MaskedNoiseConfig(rows=rows, columns=columns).build(NoiseSpec((STEPS, DIM)))
    assert space.steered.nonzero().tolist() == steered


def test_masked_without_a_mask_is_full():
    prior, u = torch.randn(2, 12), torch.randn(2, 12)
    assert torch.equal(MaskedNoiseConfig().build(NoiseSpec((12,))).expand(u, prior), u)


def test_residual_adds_to_the_prior_and_needs_it_back():
    space = ResidualNoiseConfig().build(SPEC)
    prior, u = torch.randn(3, STEPS, DIM), torch.rand(3, DIM)
    assert torch.equal(space.expand(torch.zeros(3, DIM), prior), prior)
    assert torch.allclose(space.expand(u, prior) - prior, u[:, None].expand(-1, STEPS, -1), atol=1e-6)
    assert space.project(prior, prior).abs().max() == 0  # the base's own noise: no delta
    with pytest.raises(ValueError, match="with the prior only"):
        space.project(prior)


@pytest.mark.parametrize("config", [ResidualNoiseConfig(delta="full"), MaskedNoiseConfig()])
def test_a_policy_that_feeds_itself_zero_keeps_doing_so(config):
    live = torch.arange(4) < 2
    space = config.build(NoiseSpec((4,), distribution="zero", live=live))
    noise = space.expand(torch.zeros(3, space.dim), torch.randn(3, 4))
    assert noise.abs().max() == 0
    prior = torch.randn(3, 4)
    u = torch.rand(3, space.dim)
    assert torch.allclose(space.project(space.expand(u, prior), prior), u)


def test_half_precision_noise():
    spec = NoiseSpec((STEPS, DIM), dtype=torch.bfloat16)
    for config, _ in SPACES.values():
        space = config.build(spec)
        u = torch.rand(2, space.dim)
        noise = space.expand(u, torch.randn(2, STEPS, DIM))
        assert noise.dtype == torch.bfloat16


# Options.


def parse(*options):
    from dataclasses import dataclass, field

    @dataclass
    class Config:
        noise: NoiseSpaceConfig = field(default_factory=FullNoiseConfig)

    return draccus.parse(Config, args=[f"--noise.{option}" for option in options]).noise


@pytest.mark.parametrize(
    "options, expected",
    [
        (["type=knots", "knots=4"], KnotNoiseConfig(knots=4)),
        (["type=masked", "rows=0:8", "columns=:7"], MaskedNoiseConfig(rows="0:8", columns=":7")),
        (["type=masked", "rows=01:8"], MaskedNoiseConfig(rows="01:8")),
        (["type=residual", "delta=full", "bound=0.5"], ResidualNoiseConfig(bound=0.5, delta="full")),
        (["type=constant", "ticket=repeat"], ConstantNoiseConfig(ticket="repeat")),
        (["type=repeat"], RepeatNoiseConfig()),
        (["type=repeat", "unit=bound"], RepeatNoiseConfig(unit="bound")),
    ],
)
def test_options(options, expected):
    found = parse(*options)
    assert found == expected
    assert found.type == options[0].removeprefix("type=")
    assert draccus.decode(NoiseSpaceConfig, draccus.encode(found, NoiseSpaceConfig)) == found


BAD = {
    "--noise.bound: the bound must be positive": lambda: FullNoiseConfig(bound=0.0),
    "--noise.unit: 'box' is none of deviation, bound": lambda: FullNoiseConfig(unit="box"),
    "--noise.type: repeat needs noise of shape": lambda: RepeatNoiseConfig().build(NoiseSpec((12,))),
    "--noise.type: knots needs noise of shape": lambda: KnotNoiseConfig().build(NoiseSpec((12,))),
    "--noise.knots: must be at least 1": lambda: KnotNoiseConfig(knots=0),
    "--noise.knots: this policy's noise has 6 steps": lambda: KnotNoiseConfig(knots=7).build(SPEC),
    "--noise.rows: '0-8' is no range": lambda: MaskedNoiseConfig(rows="0-8"),
    "--noise.rows: '3' is no range .* write 01:8": lambda: MaskedNoiseConfig(rows="3"),
    "--noise.columns: '68' is no range .* write 01:8": lambda: MaskedNoiseConfig(columns=68),  # from YAML
    "--noise.columns: 4:4 is empty": lambda: MaskedNoiseConfig(columns="0:2,4:4"),
    "--noise.rows: this policy's noise has 6 rows": lambda: MaskedNoiseConfig(rows="0:8").build(SPEC),
    "--noise.columns: this policy's .* 3 columns": lambda: MaskedNoiseConfig(columns="3:").build(SPEC),
    "--noise.columns: columns needs noise": lambda: MaskedNoiseConfig(columns="0:1").build(NoiseSpec((12,))),
    "--noise.rows: none of these entries": lambda: MaskedNoiseConfig(rows="4:6").build(SPEC),
    "--noise.delta: 'half' is neither full nor repeat": lambda: ResidualNoiseConfig(delta="half"),
    "--noise.delta: repeat needs noise": lambda: ResidualNoiseConfig().build(NoiseSpec((12,))),
    "--noise.start: must be above 0": lambda: ResidualNoiseConfig(start=0.0),
    "--noise.ticket: 'x' is neither": lambda: ConstantNoiseConfig(ticket="x"),
    "--noise.ticket: repeat needs": lambda: ConstantNoiseConfig(ticket="repeat").build(NoiseSpec((12,))),
    "--rl.actor.log_std_min: -1.0 leaves no room": lambda: NoiseActor(
        5, ResidualNoiseConfig().build(SPEC), ActorConfig(log_std_min=-1.0)
    ),
    "--rl.actor.mean_limit: is a share": lambda: ActorConfig(mean_limit=0.0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings(message):
    with pytest.raises(UserError, match=message):
        BAD[message]()
