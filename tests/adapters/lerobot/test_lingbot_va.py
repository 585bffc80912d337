"""What LingBot-VA has of its own: a memory over the episode, and frozen parts outside the checkpoint."""

import pytest
import torch

from tests.helpers.adapter_cases import noise_like
from tests.helpers.adapter_cases.lingbot_va import ROBOTWIN, first_chunk, frames, history
from tests.helpers.tiny import make_tiny
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.lerobot.injection import NoiseInjector

CHUNKS = 5  # more than the cache holds


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return make_tiny("lingbot_va", tmp_path_factory.mktemp("lingbot_va") / "policy")


@pytest.fixture(scope="module")
def adapter(options):
    return load_adapter(options)


def lengths(adapter):
    first = adapter.chunk_shape[0]
    return [first] + [first + adapter.config.action_per_frame] * (CHUNKS - 1)


def run_episode(adapter, episode, noises):
    """The chunks, and what each was denoised with."""
    conditionings, chunks, at = [adapter.encode(history(adapter, episode, 0))], [], 0
    for index, noise in enumerate(noises):
        chunks.append(adapter.denoise(conditionings[-1], noise))
        at += chunks[-1].shape[1]
        if index + 1 < len(noises):
            conditionings.append(adapter.follow(conditionings[-1], chunks[-1], history(adapter, episode, at)))
    return chunks, conditionings


@pytest.mark.parametrize(
    "fields",
    [{}, {"action_guidance_scale": 2.0, "action_per_frame": 8}, {"guidance_scale": 1.0}, ROBOTWIN],
    ids=["libero", "strided", "unguided", "robotwin"],
)
def test_an_episode_equals_lerobots_select_action(fields, tmp_path):
    adapter = load_adapter(make_tiny("lingbot_va", tmp_path / "policy", **fields))
    episode = frames(adapter, sum(lengths(adapter)) + 1)
    noises = [noise_like(adapter, 1, seed) for seed in range(CHUNKS)]
    draws = [draw for noise in noises for draw in (adapter.video_noise, adapter.native_noise(noise))]
    adapter.policy.reset()
    with NoiseInjector(draws) as injector:
        expected = [adapter.policy.select_action(adapter.preprocessor(dict(f))) for f in episode[:-1]]
    injector.check("lingbot_va")
    chunks, conditionings = run_episode(adapter, episode, noises)
    assert [chunk.shape[1] for chunk in chunks] == lengths(adapter)
    assert (torch.cat(chunks, 1)[0] - torch.cat(expected)).abs().max() <= 1e-5
    cache = adapter.policy.transformer.blocks[0].attn1.attn_caches["pos"]
    oldest = conditionings[-1].tensors["id"].min()
    assert oldest > 0, "the episode is too short to push anything out of the cache"
    assert cache["mask"].all()


def test_the_memory_matters(adapter):
    episode, noise = frames(adapter, sum(lengths(adapter))), noise_like(adapter, 1)
    start = adapter.encode(history(adapter, episode, 0))
    chunk = adapter.denoise(start, noise)
    later = history(adapter, episode, chunk.shape[1])
    remembered = adapter.denoise(adapter.follow(start, chunk, later), noise)
    forgetful = adapter.denoise(adapter.encode(later), noise)
    assert remembered.shape[1] == forgetful.shape[1] + adapter.config.action_per_frame
    other = adapter.denoise(adapter.follow(start, chunk + 0.5, later), noise)
    assert not torch.allclose(remembered, other)  # what was done is remembered too


def test_every_moment_of_an_episode_can_be_returned_to(adapter):
    episode = frames(adapter, sum(lengths(adapter)))
    noises = [noise_like(adapter, 1, seed) for seed in range(CHUNKS)]
    chunks, conditionings = run_episode(adapter, episode, noises)
    before = [{name: value.clone() for name, value in c.tensors.items()} for c in conditionings]
    torch.manual_seed(5)
    for index in reversed(range(CHUNKS)):
        assert torch.equal(adapter.denoise(conditionings[index], noises[index]), chunks[index])
        if index + 1 < CHUNKS:
            end = sum(chunk.shape[1] for chunk in chunks[: index + 1])
            again = adapter.follow(conditionings[index], chunks[index], history(adapter, episode, end))
            for name, value in again.tensors.items():
                assert torch.equal(value, before[index + 1][name]), name
    for conditioning, kept in zip(conditionings, before):
        assert all(torch.equal(value, kept[name]) for name, value in conditioning.tensors.items())


def test_rows_of_a_batch_equal_single_calls(adapter):
    generator = torch.Generator().manual_seed(2)
    observation = adapter.example_observation(2, generator)
    conditioning = adapter.observe(observation)
    noises = noise_like(adapter, 6)
    together = adapter.denoise(conditioning.repeat_interleave(3), noises)
    for row in range(6):
        alone = adapter.denoise(conditioning[row // 3], noises[row : row + 1])
        assert torch.equal(together[row], alone[0])
    batch = adapter.preprocess(observation)
    after = adapter.follow(conditioning, together[::3], batch)
    assert after.observations == 2
    single = {key: value[1:] for key, value in batch.items()}
    alone = adapter.follow(conditioning[1], together[3:4], single)
    assert torch.equal(adapter.denoise(after[1], noises[:1]), adapter.denoise(alone, noises[:1]))


def test_follow_needs_all_that_was_seen(adapter):
    batch = adapter.preprocess(adapter.example_observation(1, torch.Generator().manual_seed(0)))
    conditioning = adapter.encode(batch)
    chunk = adapter.denoise(conditioning, noise_like(adapter, 1))
    short = {key: value[:, -3:] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    with pytest.raises(ValueError, match="the 8 observations since its last chunk"):
        adapter.follow(conditioning, chunk, short)


def test_half_precision_equals_the_public_path(options):
    adapter = load_adapter(PolicyConfig(**{**vars(options), "dtype": "bfloat16"}))
    observation = adapter.example_observation(1, torch.Generator().manual_seed(0))
    noise = noise_like(adapter, 1)
    expected = first_chunk(adapter, adapter.preprocess(observation), adapter.native_noise(noise))
    assert torch.equal(adapter.denoise(adapter.observe(observation), noise), expected)


def test_options_are_honoured_or_refused(adapter, options, tmp_path):
    more = load_adapter(PolicyConfig(**{**vars(options), "num_inference_steps": 6}))
    observation = adapter.example_observation(1, torch.Generator().manual_seed(0))
    noise = noise_like(adapter, 1)
    chunk = more.denoise(more.observe(observation), noise)
    assert not torch.allclose(chunk, adapter.denoise(adapter.observe(observation), noise))
    with pytest.raises(UserError, match=r"--policy.tokenizer"):
        load_adapter(PolicyConfig(**{**vars(options), "tokenizer": str(tmp_path)}))
    with pytest.raises(UserError, match=r"--policy.backbone: .* no folder 'vae'"):
        load_adapter(PolicyConfig(**{**vars(options), "backbone": str(tmp_path)}))


def test_a_training_checkpoint_is_switched_to_inference(tmp_path):
    fields = {"attn_mode": "flex"}
    adapter = load_adapter(make_tiny("lingbot_va", tmp_path / "policy", **fields))
    assert adapter.config.attn_mode == "torch"
    assert any("flex" in note for note in adapter.notes)


def test_missing_frozen_parts_name_the_option(tmp_path):
    options = make_tiny("lingbot_va", tmp_path / "policy", wan_pretrained_path="robbyant/lingbot-va-base")
    with pytest.raises(UserError, match=r"--policy.backbone: .* name a folder with 'vae'"):
        load_adapter(PolicyConfig(path=options.path, device="cpu"))
