"""What pi0 and pi05 have of their own; the rest is in test_every_adapter.py."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.full_size import full_size
from tests.helpers.adapter_cases import noise_like
from tests.helpers.tiny import make_tiny
from trimtab.adapters import UserError, load_adapter
from trimtab.adapters.lerobot.injection import NoiseInjector
from trimtab.adapters.tiny.parts import camera_features
from trimtab.adapters.tiny.pi0 import MARK

PALIGEMMA = "paligemma_with_expert.paligemma."
EMBEDDING = f"{PALIGEMMA}model.language_model.embed_tokens.weight"
RENAMED = {"pi0": ("action_time_mlp_", "time_mlp_"), "pi05": ("time_mlp_", "action_time_mlp_")}

both = pytest.mark.parametrize("policy_type", ["pi0", "pi05"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By policy type: how to load a tiny policy, and what it is."""
    found = {}
    for policy_type in ("pi0", "pi05"):
        options = make_tiny(policy_type, tmp_path_factory.mktemp(policy_type) / "policy")
        found[policy_type] = options, load_adapter(options)
    return found


def observe(adapter, seed=3, count=2):
    return adapter.observe(adapter.example_observation(count, torch.Generator().manual_seed(seed)))


@both
def test_executes_what_select_action_executes(saved, policy_type):
    _, adapter = saved[policy_type]
    observation = adapter.example_observation(2, torch.Generator().manual_seed(3))
    noise = noise_like(adapter, 2)
    batch = adapter.preprocess(observation)
    adapter.policy.reset()
    with NoiseInjector(noise) as injector:
        actions = [adapter.policy.select_action(dict(batch)) for _ in range(adapter.chunk_shape[0])]
    assert injector.hits == 1
    assert torch.allclose(adapter.denoise(adapter.encode(batch), noise), torch.stack(actions, 1), atol=1e-5)


def test_pi05_reads_the_state_in_its_prompt(saved):
    _, adapter = saved["pi05"]
    observation = adapter.example_observation(1, torch.Generator().manual_seed(3))
    moved = {**observation, "observation.state": observation["observation.state"] + 0.2}
    noise = noise_like(adapter, 1)
    chunks = [adapter.denoise(adapter.observe(each), noise) for each in (observation, moved)]
    assert not torch.equal(*chunks)


@both
def test_file_of_an_older_version(saved, policy_type, tmp_path):
    """No "model." before the names, the embedding as ``lm_head`` only, the other type's name of the MLP."""
    _, adapter = saved[policy_type]
    folder = tmp_path / "older"
    again = make_tiny(policy_type, folder)
    tensors = {
        key.removeprefix("model."): value for key, value in load_file(folder / "model.safetensors").items()
    }
    tensors[f"{PALIGEMMA}lm_head.weight"] = tensors.pop(EMBEDDING)
    new, old = RENAMED[policy_type]
    tensors = {old + key.removeprefix(new) if key.startswith(new) else key: v for key, v in tensors.items()}
    if policy_type == "pi05":
        tensors["state_proj.weight"] = torch.zeros(64, 8)
    save_file(tensors, folder / "model.safetensors")
    older, noise = load_adapter(again), noise_like(adapter, 2)
    assert torch.equal(older.denoise(observe(older), noise), adapter.denoise(observe(adapter), noise))
    del tensors[f"{PALIGEMMA}lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="2 tensors missing"):  # LeRobot goes on with random embeddings
        load_adapter(again)


@both
def test_relative_actions_keep_each_observations_state(policy_type, tmp_path):
    names = ["shoulder", "gripper", "elbow"]
    adapter = load_adapter(
        make_tiny(policy_type, tmp_path / "policy", use_relative_actions=True, action_feature_names=names)
    )
    seeds, noise = (3, 4), noise_like(adapter, 2)
    conditionings = [observe(adapter, seed) for seed in seeds]
    states = []
    for seed, conditioning in zip(seeds, conditionings):
        observation = adapter.example_observation(2, torch.Generator().manual_seed(seed))
        states.append(observation["observation.state"][:, 0])
        chunk = adapter.denoise(conditioning, noise)
        actions = adapter.postprocess(chunk, conditioning)
        adapter.preprocess(observation)  # LeRobot's order: the state that it saw last
        assert torch.equal(actions, adapter.postprocessor(chunk))
        more = adapter.postprocess(chunk.repeat_interleave(3, 0), conditioning.repeat_interleave(3))
        assert torch.equal(more, actions.repeat_interleave(3, 0))
    zero = torch.zeros(2, *adapter.chunk_shape)
    offset = adapter.postprocess(zero, conditionings[0]) - adapter.postprocess(zero, conditionings[1])
    difference = (states[0] - states[1])[:, None, :3] * torch.tensor([1.0, 0.0, 1.0])  # not the gripper
    assert torch.allclose(offset, difference.expand_as(offset), atol=1e-6)


@both
def test_bfloat16(saved, policy_type):
    options, adapter = saved[policy_type]
    options = type(options)(**{**vars(options), "dtype": "bfloat16"})
    rough = load_adapter(options)
    assert {p.dtype for p in rough.policy.parameters()} == {
        torch.float32,
        torch.bfloat16,
    }  # norms, vision stay
    noise = noise_like(adapter, 2)
    exact, near = (each.denoise(observe(each), noise) for each in (adapter, rough))
    assert near.dtype == torch.float32
    assert 0 < (exact - near).abs().max() < 0.05 * exact.abs().max()
    batch = rough.preprocess(rough.example_observation(2, torch.Generator().manual_seed(3)))
    public = rough.executed(rough.policy.predict_action_chunk(dict(batch), noise=noise))
    assert torch.allclose(near, public, atol=1e-5)
    options.dtype = "float16"
    with pytest.raises(UserError, match=f"{policy_type} policy runs in float32 or bfloat16"):
        load_adapter(options)


@both
def test_number_of_steps_and_real_time_chunking(saved, policy_type, tmp_path):
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    options, adapter = saved[policy_type]
    noise = noise_like(adapter, 2)
    few = load_adapter(type(options)(**{**vars(options), "num_inference_steps": 2}))
    assert not torch.allclose(few.denoise(observe(few), noise), adapter.denoise(observe(adapter), noise))
    chunking = load_adapter(
        make_tiny(policy_type, tmp_path / "rtc", rtc_config=RTCConfig(enabled=True), compile_model=True)
    )
    assert "real-time chunking is off" in chunking.notes[0]
    assert torch.equal(chunking.denoise(observe(chunking), noise), adapter.denoise(observe(adapter), noise))


@both
def test_missing_camera_is_masked(policy_type, tmp_path):
    """As LeRobot does it: checkpoints for three cameras run where there are two."""
    adapter = load_adapter(make_tiny(policy_type, tmp_path / "policy", **camera_features(2)))
    observation = adapter.example_observation(2, torch.Generator().manual_seed(3))
    noise = noise_like(adapter, 2)
    whole = adapter.denoise(adapter.observe(observation), noise)
    del observation["observation.images.camera1"]
    batch = adapter.preprocess(observation)
    chunk = adapter.denoise(adapter.encode(batch), noise)
    assert not torch.allclose(chunk, whole)
    public = adapter.policy.predict_action_chunk(dict(batch), noise=noise)
    assert torch.allclose(chunk, adapter.executed(public), atol=1e-5)
    del observation["observation.images.camera2"]
    with pytest.raises(UserError, match=r"the policy needs observation\.images\.camera1, .*camera2"):
        adapter.preprocess(observation)


@both
def test_tokenizer_that_cannot_be_fetched(saved, policy_type):
    options, _ = saved[policy_type]
    with pytest.raises(UserError, match=r"--policy\.tokenizer=FOLDER"):
        load_adapter(type(options)(**{**vars(options), "tokenizer": None}))


@both
def test_sixteen_noises_at_real_size(saved, policy_type):
    """Making tiny policies (``saved``) must not have changed the sizes of real ones."""
    adapter, batch = full_size(policy_type)
    assert adapter.config.paligemma_variant != MARK
    assert 4.0e9 < sum(parameter.numel() for parameter in adapter.policy.parameters()) < 4.2e9
    steps, adapter.config.num_inference_steps = adapter.config.num_inference_steps, 1  # each costs the same
    with FlopCounterMode(display=False) as counter:
        conditioning = adapter.encode(batch)
    prefix, step = counter.get_total_flops(), {}
    for count in (1, 16):
        noise = torch.zeros(count, *adapter.noise_spec.shape, device="meta")
        with FlopCounterMode(display=False) as counter:
            chunk = adapter.denoise(conditioning.repeat_interleave(count), noise)
        assert chunk.shape == (count, *adapter.chunk_shape)
        step[count] = counter.get_total_flops()
    assert prefix + steps * step[16] <= 3 * (prefix + steps * step[1])
    with FlopCounterMode(display=False) as counter:
        adapter.policy.predict_action_chunk(batch)
    assert prefix + step[1] == counter.get_total_flops()
