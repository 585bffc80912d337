"""What every adapter must do, on a tiny random instance of the real LeRobot class."""

from contextlib import nullcontext
from copy import copy

import pytest
import torch

from tests.helpers.adapter_cases import all_cases, noise_like
from tests.helpers.tiny import make_tiny
from trimtab.adapters import UserError, load_adapter
from trimtab.adapters.checkpoint.identity import weights_hash
from trimtab.policies.observe import ObserveConfig

BACKBONE_FIRST = ("fastwam", "molmoact2", "wall_x")


@pytest.fixture(scope="module", params=all_cases(), ids=lambda case: case.id)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def options(case, tmp_path_factory):
    return make_tiny(case.type, tmp_path_factory.mktemp(case.type) / "policy", **case.fields)


@pytest.fixture(scope="module")
def adapter(options):
    return load_adapter(options)  # verifies


@pytest.fixture(scope="module")
def batch_size(adapter):
    return adapter.max_batch or 2


@pytest.fixture(scope="module")
def observation(adapter, batch_size):
    return adapter.example_observation(batch_size, torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def conditioning(adapter, observation):
    return adapter.observe(observation)


def test_equals_the_public_path(case, adapter, observation, conditioning, batch_size):
    noise = noise_like(adapter, batch_size)
    chunk = adapter.denoise(conditioning, noise)
    assert chunk.shape == (batch_size, *adapter.chunk_shape)
    expected = case.public(adapter, adapter.preprocess(observation), adapter.native_noise(noise))
    assert (chunk - adapter.executed(expected)).abs().max() <= 1e-5


def test_equals_a_policy_that_lerobot_loaded(case, adapter, options, observation, conditioning, batch_size):
    """Not the adapter's own instance: weights, precision and settings must be those that LeRobot runs."""
    if case.type in BACKBONE_FIRST:
        pytest.skip("LeRobot loads the backbone's own weights first, which the tiny instance has none of")
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class

    config = PreTrainedConfig.from_pretrained(options.path)
    config.device = "cpu"
    for name in ("noise_scheduler_type", "num_inference_steps"):  # DDPM is switched on purpose
        if adapter.notes and hasattr(config, name):
            setattr(config, name, getattr(adapter.config, name))
    scope = nullcontext()
    if case.type in ("pi0", "pi05"):
        from trimtab.adapters.tiny.pi0 import narrow

        scope = narrow(config)
    with scope:
        theirs = get_policy_class(case.type).from_pretrained(options.path, config=config).eval()
    ours = adapter.policy.state_dict()
    for name, tensor in theirs.state_dict().items():
        if name in ours:
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
    other = copy(adapter)
    other.policy = theirs
    noise = noise_like(adapter, batch_size)
    expected = case.public(other, adapter.preprocess(observation), adapter.native_noise(noise))
    assert (adapter.denoise(conditioning, noise) - adapter.executed(expected)).abs().max() <= 1e-5


def test_same_noise_same_chunk_other_noise_other_chunk(adapter, conditioning, batch_size):
    noise = noise_like(adapter, batch_size)
    once = adapter.denoise(conditioning, noise)
    torch.manual_seed(99)  # nothing may depend on the global generator
    assert torch.equal(once, adapter.denoise(conditioning, noise))
    assert not torch.allclose(once, adapter.denoise(conditioning, noise_like(adapter, batch_size, 2)))


def test_observation_matters(adapter, conditioning, batch_size):
    other = adapter.observe(adapter.example_observation(batch_size, torch.Generator().manual_seed(4)))
    noise = noise_like(adapter, batch_size)
    assert not torch.equal(adapter.denoise(conditioning, noise), adapter.denoise(other, noise))


def test_many_noises_in_one_batch_equal_single_calls(adapter, conditioning):
    if adapter.max_batch == 1:
        pytest.skip("the policy takes one sample at a time")
    k = 3
    noises = noise_like(adapter, conditioning.batch_size * k)
    repeated = conditioning.repeat_interleave(k)
    assert repeated.batch_size == len(noises)
    together = adapter.denoise(repeated, noises)
    for row in range(len(noises)):
        alone = adapter.denoise(conditioning[row // k], noises[row : row + 1])
        assert (together[row] - alone[0]).abs().max() <= 1e-5
    picked = adapter.denoise(repeated[[1, 4]], noises[[1, 4]])  # rows of a repeated conditioning
    assert (picked - together[[1, 4]]).abs().max() <= 1e-5


def test_an_instruction_does_not_change_what_stands_beside_it(adapter, observation, batch_size):
    """A shorter one is padded; or instructions of several lengths are refused."""
    if not adapter.reads_task or batch_size < 2:
        pytest.skip("it reads no task, or looks at one observation at a time")
    tasks = ["pick up the red cube and push it to the goal", "push"] * batch_size
    mixed = observation | {"task": tasks[:batch_size]}
    try:
        together = adapter.observe(mixed)
    except UserError as error:
        assert "attends to the padding of shorter instructions" in str(error)
        return
    noise = noise_like(adapter, batch_size)
    chunks, other = (
        adapter.denoise(together, noise),
        adapter.denoise(together, noise_like(adapter, batch_size, 2)),
    )
    for row in range(2):
        one = {k: v[row : row + 1] if k != "task" else [v[row]] for k, v in mixed.items()}
        alone = adapter.denoise(adapter.observe(one), noise[row : row + 1])
        assert (alone[0] - chunks[row]).abs().max() <= 1e-3 * (chunks - other).abs().max()


def test_conditioning_survives_denoising(adapter, conditioning, batch_size):
    before = {name: tensor.clone() for name, tensor in conditioning.tensors.items()}
    adapter.denoise(conditioning, noise_like(adapter, batch_size))
    for name, tensor in conditioning.tensors.items():
        assert torch.equal(tensor, before[name]), name


def test_encode_does_not_change_the_batch(adapter, observation):
    batch = adapter.preprocess(observation)
    before = {key: value.clone() for key, value in batch.items() if isinstance(value, torch.Tensor)}
    adapter.encode(batch)
    for key, value in before.items():
        assert torch.equal(batch[key], value), key


def test_inert_entries(case, adapter, conditioning, batch_size):
    live = adapter.noise_spec.live
    if live is None:
        live = torch.ones(adapter.noise_spec.shape, dtype=torch.bool)
    assert live.shape == adapter.noise_spec.shape
    assert int((~live).sum()) == case.inert
    noise = noise_like(adapter, batch_size)
    other = noise_like(adapter, batch_size, 2)
    chunk = adapter.denoise(conditioning, noise)
    assert torch.equal(chunk, adapter.denoise(conditioning, torch.where(live, noise, other)))
    if live.ndim == 2:  # each column that is reported live does change the chunk
        for column in torch.nonzero(live.any(0)).flatten().tolist():
            changed = noise.clone()
            changed[:, live[:, column], column] = other[:, live[:, column], column]
            assert not torch.equal(chunk, adapter.denoise(conditioning, changed)), column


def test_wrong_noise_is_a_clear_error(adapter, conditioning, batch_size):
    noise = noise_like(adapter, batch_size)
    with pytest.raises(ValueError, match=r"noise has shape .* takes"):
        adapter.denoise(conditioning, noise_like(adapter, batch_size + 1))
    with pytest.raises(ValueError, match=r"noise has shape .* takes"):
        adapter.denoise(conditioning, noise[..., :-1])
    with pytest.raises(ValueError, match=r"noise is torch.float64"):
        adapter.denoise(conditioning, noise.double())


def test_postprocess_equals_lerobots(adapter, conditioning, batch_size):
    chunk = adapter.denoise(conditioning, noise_like(adapter, batch_size))
    actions = adapter.postprocess(chunk, conditioning)
    assert actions.shape[:2] == chunk.shape[:2]
    assert actions.shape[2] == adapter.config.output_features["action"].shape[0]
    for step in range(chunk.shape[1]):  # LeRobot post-processes one step at a time
        assert torch.allclose(actions[:, step], adapter.postprocessor(chunk[:, step]), atol=1e-6)


def test_noise_actor_looks_at_backbone_features_by_default(adapter):
    assert ObserveConfig().resolved(adapter, ["push the button"]).inputs == ["features"]


def test_features_tell_observations_apart(adapter, conditioning, batch_size):
    features = adapter.features(conditioning)
    assert features is not None and features.shape[0] == batch_size and features.ndim == 2
    assert torch.isfinite(features).all()
    other = adapter.observe(adapter.example_observation(batch_size, torch.Generator().manual_seed(4)))
    assert not torch.allclose(features, adapter.features(other))
    assert features.numel() < 100_000 * batch_size


def test_loading_again_gives_the_same_function(adapter, options, conditioning, observation, batch_size):
    again = load_adapter(options)
    assert weights_hash(again.policy) == weights_hash(adapter.policy)
    assert not any(parameter.requires_grad for parameter in again.policy.parameters())
    assert not any(module.training for module in again.policy.modules())
    noise = noise_like(adapter, batch_size)
    chunk = again.denoise(again.observe(observation), noise)
    assert (chunk - adapter.denoise(conditioning, noise)).abs().max() <= 1e-6
