"""Pixels in the replay: uint8, exact, and each frame once."""

import numpy as np
import pytest
import torch

from trimtab.rl.data.replay import FrameStore, Layout, ReplayBuffer
from trimtab.rl.data.returns import NStepAccumulator, Transition

PIXELS = 3 * 16 * 16
LAYOUT = Layout(2 + PIXELS, 1, pixels=PIXELS)


def observation(rng):
    """Two numbers and an image, packed."""
    return np.concatenate([rng.normal(size=2), rng.integers(0, 256, PIXELS)]).astype(np.float32)


def episodes(count, chunks, n_step):
    """Transitions of ``count`` episodes, and the observations in them, in order."""
    rng, done, seen = np.random.default_rng(0), [], []
    for _ in range(count):
        accumulator, before = NStepAccumulator(n_step), observation(rng)
        seen.append(before)
        for chunk in range(chunks):
            after = observation(rng)
            seen.append(after)
            transition = Transition(before, np.zeros(1), float(len(done)), 0.9, after)
            done += accumulator.add(transition, chunk == chunks - 1)
            before = after
    return done, seen


@pytest.mark.parametrize("n_step", [1, 3])
def test_round_trip_is_exact_and_each_frame_is_kept_once(n_step):
    transitions, seen = episodes(5, 8, n_step)
    for row, transition in enumerate(transitions):
        transition.reward = float(row)
    replay = ReplayBuffer(100, LAYOUT, seed=0)
    for transition in transitions:
        replay.add(transition)
    assert len(transitions) == 40 and len(seen) == 45 == len(replay._frames)
    assert replay._frames.pixels.dtype == torch.uint8
    batch = replay.sample(300)
    for row, reward in enumerate(batch["reward"].long().tolist()):
        assert np.array_equal(batch["features"][row], transitions[reward].features)
        assert np.array_equal(batch["next_features"][row], transitions[reward].next_features)
    assert batch["features"].dtype == torch.float32
    assert replay.all_features().shape == (40, 2)


def test_memory_per_transition():
    """One frame of a 64 x 64 camera is 12 KiB; in float32, and twice, it would be 96."""
    transitions, seen = episodes(40, 25, 3)
    replay = ReplayBuffer(len(transitions), LAYOUT, seed=0)
    for transition in transitions:
        replay.add(transition)
    assert len(replay._frames) == len(seen) == 1.04 * len(transitions)
    assert replay._frames.pixels.element_size() * PIXELS == 768
    assert len(replay._frames.pixels) < 2 * len(seen)  # room by doubling, touched as it fills


def test_frames_go_with_their_last_transition():
    transitions, _ = episodes(3, 10, 2)
    replay = ReplayBuffer(7, LAYOUT, seed=0)
    for count, transition in enumerate(transitions, start=1):
        replay.add(transition)
        held = transitions[max(0, count - 7) : count]
        frames = {t.features[2:].tobytes() for t in held} | {t.next_features[2:].tobytes() for t in held}
        assert len(replay._frames) == len(frames)
    batch = replay.sample(200)
    kept = {t.features.tobytes() for t in transitions[-7:]}
    assert {row.numpy().tobytes() for row in batch["features"]} == kept
    assert len(replay._frames.pixels) == 64  # slots are used again


def test_frames_are_kept_while_the_store_grows():
    store, count = FrameStore(2), 300  # its room doubles at 64, 128 and 256
    slots = [store.put(np.array([n % 256, n // 256], np.uint8)) for n in range(count)]
    wanted = torch.tensor([[n % 256, n // 256] for n in range(count)])
    assert len(store) == count and torch.equal(store.pixels[slots].long(), wanted)


def test_same_frame_twice_counts_twice():
    frames, one = FrameStore(4), np.arange(4, dtype=np.uint8)
    first, second, other = frames.put(one), frames.put(one.copy()), frames.put(one + 1)
    assert first == second != other and len(frames) == 2
    frames.release(first)
    assert torch.equal(frames.pixels[[first, other]], torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]]).byte())
    frames.release(first)
    assert len(frames) == 1 and frames.put(one + 2) == first


def test_nan_is_kept_out_and_leaves_no_frame():
    replay = ReplayBuffer(4, LAYOUT, seed=0)
    good = observation(np.random.default_rng(0))
    with pytest.raises(ValueError, match="'reward'"):
        replay.add(Transition(good, np.zeros(1), float("nan"), 0.5, good))
    assert len(replay._frames) == len(replay) == 0


def test_pixels_go_through_a_checkpoint_in_parts():
    """The rows that a checkpoint holds fill another buffer, whose ring has wrapped, to the bit."""
    transitions, _ = episodes(5, 8, 3)
    one = ReplayBuffer(30, LAYOUT, seed=0)
    for transition in transitions:
        one.add(transition)
    other = ReplayBuffer(30, LAYOUT, seed=0)
    for start, stop in ((10, 25), (25, 40)):
        other.put(start, {name: value.clone() for name, value in one.rows(start, stop).items()})
    other.load_state_dict(one.state_dict())
    assert len(other) == 30 and len(other._frames) == len(one._frames)
    first, second = one.sample(64), other.sample(64)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for buffer in (one, other):  # the oldest makes room in both
        buffer.add(transitions[0])
    assert len(other._frames) == len(one._frames)
    first, second = one.sample(64), other.sample(64)
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = one.rows(20, 30)
    rows["pixels"] = rows["pixels"][:, :, :5]
    with pytest.raises(ValueError, match="pixels"):
        ReplayBuffer(30, LAYOUT, seed=0).put(20, rows)
