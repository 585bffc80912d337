"""What actor and critics look at: the default, packed observations, the encoder, the random shift."""

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from torch.nn.functional import interpolate

from tests.conftest import make_diffusion
from tests.helpers.pixels import CAMERA, SIDE, PixelPointAdapter
from tests.helpers.point import PointAdapter
from tests.helpers.steered import load, observations, processors
from trimtab.adapters import Conditioning, PolicyAdapter, PolicyConfig, UserError, load_adapter
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.artefact import load_artefact, read_config, save_artefact
from trimtab.policies.critic import CriticConfig, CriticEnsemble
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.policies.observe import (
    ObservationEncoder,
    ObserveConfig,
    Observer,
    build_observer,
    images,
    random_shift,
)
from trimtab.policies.steered.processor_trimtab import RAW_TASK

ALL = ["features", "state", "images", "task"]
TASKS = ["push the T", "turn it round"]


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    """A diffusion policy with a camera, a state, and a history of two observations."""
    folder = make_diffusion(tmp_path_factory.mktemp("camera"), images=True)
    return folder, load_adapter(PolicyConfig(path=str(folder), device="cpu"))


@pytest.fixture(autouse=True)
def forget(camera):
    yield
    camera[1].observer = None


# The random shift.


def shifted_by_hand(images, pad, rows, columns):
    """Pad by repeating the border, then crop at the drawn place, pixel by pixel."""
    padded = torch.nn.functional.pad(images.float(), (pad,) * 4, mode="replicate").to(images.dtype)
    height, width = images.shape[-2:]
    crops = [
        padded[i, :, pad + r : pad + r + height, pad + c : pad + c + width]
        for i, (r, c) in enumerate(zip(rows, columns, strict=True))
    ]
    return torch.stack(crops)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_random_shift_is_pad_and_crop(dtype):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 6, 9, 7)).to(dtype)
    torch.manual_seed(1)
    shifted = random_shift(images, 3)
    torch.manual_seed(1)
    rows, columns = torch.randint(-3, 4, (2, 64, 1)).squeeze(-1).tolist()
    assert set(rows) == set(columns) == set(range(-3, 4))
    assert shifted.dtype == dtype
    assert torch.equal(shifted, shifted_by_hand(images, 3, rows, columns))
    assert random_shift(images, 0) is images


# The encoder.


def test_encoder_by_hand():
    """Layer by layer, with torch's functions in the place of its modules."""
    torch.manual_seed(0)
    config = ObserveConfig(inputs=["state", "images"], cameras=["a", "b"], image_size=20, image_dim=7)
    encoder = ObservationEncoder(3, config)
    packed = torch.cat([torch.randn(4, 3), torch.randint(0, 256, (4, 6 * 400)).float()], 1)
    x = packed[:, 3:].reshape(4, 6, 20, 20) / 255 - 0.5
    weights = list(encoder.parameters())
    for layer, stride in enumerate((2, 1, 1, 1)):
        x = torch.relu(torch.conv2d(x, weights[2 * layer], weights[2 * layer + 1], stride))
    assert x.shape == (4, 32, 3, 3)
    x = x.flatten(1) @ weights[8].T + weights[9]
    x = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, unbiased=False, keepdim=True) + 1e-5)
    expected = torch.cat([packed[:, :3], torch.tanh(x)], 1)
    assert encoder.dim == 10
    assert torch.allclose(encoder(packed), expected, atol=1e-5)
    assert not torch.equal(encoder(packed, augment=True), encoder(packed))


def test_without_images_nothing_changes():
    features = torch.randn(3, 5)
    encoder = ObservationEncoder(5)
    assert encoder(features, augment=True) is features and encoder.dim == 5 and not encoder.state_dict()


def test_smallest_image_fits_the_encoder():
    config = ObserveConfig(inputs=["images"], cameras=["a"], image_size=15)
    assert ObservationEncoder(0, config)(torch.zeros(1, 675)).shape == (1, 50)


def test_actor_sees_images_unshifted_when_it_acts():
    torch.manual_seed(0)
    config = ObserveConfig(inputs=["images"], cameras=["a"], image_size=15)
    space = FullNoiseConfig().build(PointAdapter().noise_spec)
    actor = NoiseActor(0, space, ActorConfig(hidden=8, layers=1), config)
    torch.nn.init.normal_(actor.net[-1].weight)
    packed, prior = torch.randint(0, 256, (5, 675)).float(), torch.zeros(5, 2, 1)
    first = actor.act(packed, prior, deterministic=True)
    assert torch.equal(first, actor.act(packed, prior, deterministic=True))
    mean, _ = actor(actor.encoder(packed))
    assert torch.allclose(first.flatten(1), space.squash(mean), atol=1e-5)  # acting runs other kernels
    assert first.std(0).min() > 1e-3


# The default.


def test_default_is_features_and_needs_no_observer(camera):
    assert build_observer(ObserveConfig(), camera[1], TASKS) is None
    assert build_observer(ObserveConfig(inputs=["features"]), camera[1], TASKS) is None
    assert build_observer(ObserveConfig(), PointAdapter(), TASKS) is None


def without(adapter, *names):
    """The adapter as if its policy had no such inputs; and no features."""
    blind = type("Blind", (type(adapter),), {"features": PolicyAdapter.features})
    adapter.__class__ = blind
    for name in names:
        del adapter.policy.config.input_features[name]
    return adapter


def test_default_without_features_is_what_the_policy_has():
    both = PixelPointAdapter()
    both.policy.config.input_features["observation.state"] = PolicyFeature(FeatureType.STATE, (1,))
    assert ObserveConfig().resolved(both, TASKS).inputs == ["state", "images"]
    assert ObserveConfig().resolved(PixelPointAdapter(), TASKS).inputs == ["images"]
    assert ObserveConfig().resolved(without(PointAdapter()), TASKS).inputs == ["state"]
    with pytest.raises(UserError, match=r"--policy.path: the test_point adapter offers nothing to steer by"):
        ObserveConfig().resolved(without(PixelPointAdapter(), CAMERA), TASKS)


# Packing.


def test_a_camera_that_the_environment_lacks(camera):
    adapter = camera[1]
    observer = build_observer(ObserveConfig(inputs=["images"]), adapter, TASKS[:1])
    (key,) = observer.config.cameras
    batch = {"observation.state": torch.zeros(1, 2), "task": TASKS[:1]}
    with pytest.raises(UserError, match=f"--observe.cameras: the environment gives no {key}"):
        images(adapter, batch, observer.config.cameras, 16)


def test_packed_observation_holds_each_part_in_its_place(camera):
    """A real policy, whose images its preprocessor normalises by mean and deviation."""
    adapter = camera[1]
    config = ObserveConfig(inputs=ALL, image_size=20)
    adapter.observer = build_observer(config, adapter, [TASKS[1], TASKS[0], TASKS[1]])
    raw = adapter.example_observation(3, torch.Generator().manual_seed(2)) | {"task": [*TASKS, TASKS[0]]}
    conditioning = adapter.observe(raw)
    seen = adapter.seen(conditioning)
    batch = adapter.preprocess(raw)
    last = raw["observation.image"][:, -1]
    assert (batch["observation.image"][:, -1] - last).abs().max() > 0.05  # it does normalise
    small = interpolate(last, (20, 20), mode="bilinear", antialias=True)
    parts = [
        adapter.features(conditioning),
        batch["observation.state"].flatten(1),
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
        (small * 255).round().flatten(1),
    ]
    width = sum(part.shape[1] for part in parts[:3])
    assert seen.shape == (3, width + 1200) and adapter.observer.config.pixels == 1200
    assert torch.allclose(seen[:, :width], torch.cat(parts[:3], 1).float())
    assert torch.equal(seen[:, width:], seen[:, width:].to(torch.uint8).float())
    assert (seen[:, width:] - parts[3]).abs().max() <= 1
    assert torch.equal(adapter.seen(conditioning[1]), seen[1:2])
    assert torch.equal(adapter.seen(conditioning.repeat_interleave(2))[3], seen[1])
    for noise in torch.randn(1, 3, *adapter.noise_spec.shape):  # what is denoised does not change by it
        plain = Conditioning(conditioning.tensors)
        assert torch.equal(adapter.denoise(conditioning, noise), adapter.denoise(plain, noise))


def packing(adapter):
    """A preprocessor that hides its images, as groot's does."""
    adapter.preprocessor = lambda observation: {k: v for k, v in observation.items() if k != CAMERA}
    adapter.history = False
    return adapter


def told(config, adapter, tasks=TASKS):
    return lambda: build_observer(config, adapter(), tasks)


BAD = {
    "--observe.inputs: takes some of": lambda: ObserveConfig(inputs=["pixels"]),
    "--observe.inputs: takes some of .*each once": lambda: ObserveConfig(inputs=["state", "state"]),
    "--observe.inputs: takes some of .* got": lambda: ObserveConfig(inputs=[]),
    "--observe.image_size: must be at least 15": lambda: ObserveConfig(image_size=14),
    "--observe.image_dim": lambda: ObserveConfig(image_dim=0),
    "--observe.shift": lambda: ObserveConfig(shift=-1),
    "--observe.inputs: the test_point policy has no camera": told(
        ObserveConfig(inputs=["images"]), PointAdapter
    ),
    "--observe.inputs: the test_point policy is given no state": told(
        ObserveConfig(inputs=["state"]), PixelPointAdapter
    ),
    "--observe.inputs: the test_point adapter offers no features": told(
        ObserveConfig(inputs=["features", "images"]), PixelPointAdapter
    ),
    "--observe.cameras: the policy has no observation.wrist, only observation.image": told(
        ObserveConfig(inputs=["images"], cameras=["observation.wrist"]), PixelPointAdapter
    ),
    "--observe.inputs: the preprocessor of this test_point policy does not hand on observation.image": told(
        ObserveConfig(inputs=["images"]), lambda: packing(PixelPointAdapter())
    ),
    "--env.task: the noise actor was told of 'push the T', 'turn it round', not of 'fly'": lambda: Observer(
        ObserveConfig(inputs=["task"], tasks=TASKS), PointAdapter()
    )(Conditioning({"state": torch.zeros(1, 2)}), {}, ["fly"]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings(message):
    with pytest.raises(UserError, match=message):
        BAD[message]()


# The artefact, and the steered policy as LeRobot runs it.


def test_artefact_of_an_actor_that_looks_at_images(camera, tmp_path):
    """Actor, encoder and critic come back; LeRobot's path sees what the collector's saw."""
    folder, adapter = camera
    observer = build_observer(ObserveConfig(inputs=ALL, image_size=SIDE), adapter, TASKS)
    adapter.observer = observer
    torch.manual_seed(0)
    noise, options = FullNoiseConfig(), PolicyConfig(path=str(folder), device="cpu")
    raw = [one | {"task": [TASKS[0], TASKS[1], TASKS[1]]} for one in observations(adapter, 2)]
    history = {k: torch.stack([one[k] for one in raw], 1) for k in raw[0] if k != "task"}
    conditioning = adapter.observe(history | {"task": raw[0]["task"]})
    seen = adapter.seen(conditioning)
    space = noise.build(adapter.noise_spec)
    vector = seen.shape[1] - observer.config.pixels
    actor = NoiseActor(vector, space, ActorConfig(hidden=16, layers=2), observer.config).eval()
    torch.nn.init.normal_(actor.net[-1].weight, std=0.5)
    size = CriticConfig(hidden=16, layers=1)
    critic = CriticEnsemble(actor.encoder.dim, 6, size).eval().requires_grad_(False)
    out = save_artefact(tmp_path / "artefact", actor, noise, adapter, options, folder, {}, (critic, size))
    assert read_config(out).observe == observer.config and read_config(out).feature_dim == vector

    steered = load_artefact(PolicyConfig(path=str(out), device="cpu"))
    prior = torch.randn(3, *adapter.noise_spec.shape)
    chosen = actor.act(seen, prior, deterministic=True)
    assert torch.equal(steered.actor.act(seen, prior, deterministic=True), chosen)
    assert torch.equal(
        steered.adapter.seen(steered.adapter.observe(history | {"task": raw[0]["task"]})), seen
    )

    before, _ = processors(out)
    expected = adapter.denoise(conditioning, chosen)
    policy = load(out)
    policy.reset()
    policy._observations.append(before(dict(raw[0])))
    policy._observations.append(before(dict(raw[1])))
    batch = policy._history(list(policy._observations))
    assert torch.allclose(policy.predict_action_chunk(batch, prior), expected, atol=1e-5)
    policy.reset()
    flat = {k: v for k, v in before(dict(raw[1])).items() if k not in ("task", RAW_TASK)}
    with pytest.raises(UserError, match=r"--env.task: the noise actor was told of"):
        policy.predict_action_chunk(flat)

    best = load(out, "--num_candidates=4")
    torch.manual_seed(4)
    chunk = best.predict_action_chunk(batch, prior)
    torch.manual_seed(4)
    drawn = torch.randn(9, *adapter.noise_spec.shape)
    for row in range(3):
        others = [space.expand(space.squash(d[None].flatten(1)), d[None])[0] for d in drawn[3 * row :][:3]]
        chunks = torch.stack([adapter.denoise(conditioning[row], n[None])[0] for n in [chosen[row], *others]])
        values = critic(actor.encoder(seen[row : row + 1]).expand(4, -1), chunks.flatten(1)).mean(0)
        assert torch.allclose(chunk[row], chunks[values.argmax()], atol=1e-5)
