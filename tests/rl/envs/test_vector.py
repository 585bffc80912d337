"""Chunk-level stepping, in this process and in workers."""

import time

import numpy as np
import pytest

from tests.helpers.faulty import FaultyConfig
from tests.helpers.point import PointConfig, PointEnv
from trimtab.adapters import UserError
from trimtab.rl.envs.chunk import ChunkEnv
from trimtab.rl.envs.metaworld import MetaworldStateConfig
from trimtab.rl.envs.vector import ChunkVectorEnv

STILL = np.zeros((4, 1), dtype=np.float32)
RIGHT = np.ones((4, 1), dtype=np.float32)


def test_last_chunk_is_as_long_as_the_episode_allows():
    env = ChunkEnv(PointEnv(limit=6))
    env.reset(0)
    first = env.step_chunk(STILL)
    assert (first.steps, first.ended, first.final_observation) == (4, False, None)
    last = env.step_chunk(STILL)
    assert (last.steps, last.terminated, last.truncated) == (2, False, True)
    assert last.seed == 0 and last.observation is None
    assert env.reset(1)["environment_state"][0, 0] != last.final_observation["environment_state"][0, 0]


def test_success_ends_the_chunk_and_is_no_truncation():
    point = PointEnv(limit=20)
    env = ChunkEnv(point)
    env.reset(0)
    point.x, point.goal = 0.0, 0.4  # 0.15 and 0.30: near enough at the second or third step
    result = env.step_chunk(RIGHT)
    assert result.terminated and not result.truncated
    assert result.successes.tolist() == [False] * (result.steps - 1) + [True]
    assert result.observation is None
    assert result.final_observation["agent_pos"][-1, 0] == point.x
    with pytest.raises(RuntimeError, match="has ended"):
        env.step_chunk(RIGHT)


def test_success_in_the_very_last_step_terminates():
    point = PointEnv(limit=3)
    env = ChunkEnv(point)
    env.reset(0)
    point.x, point.goal = 0.0, 0.5
    result = env.step_chunk(RIGHT)
    assert (result.steps, result.terminated, result.truncated) == (3, True, False)


def test_a_time_limit_that_the_environment_leaves_to_its_caller():
    """lerobot-eval stops at `_max_episode_steps`; some of LeRobot's environments never truncate."""
    endless = PointEnv(limit=10**6)
    endless._max_episode_steps = 6
    env = ChunkEnv(endless)
    env.reset(0)
    env.step_chunk(STILL)
    last = env.step_chunk(STILL)
    assert (last.steps, last.terminated, last.truncated) == (2, False, True)


def test_success_in_the_last_step_before_the_callers_time_limit_terminates():
    """Success is the end of the episode: nothing that follows may be valued."""
    endless = PointEnv(limit=10**6)
    endless._max_episode_steps = 3
    env = ChunkEnv(endless)
    env.reset(0)
    endless.x, endless.goal = 0.0, 0.5  # 0.45 in the third step
    result = env.step_chunk(RIGHT)
    assert result.successes.tolist() == [False, False, True]
    assert (result.terminated, result.truncated) == (True, False)


def test_history_is_lerobots_queue():
    point = PointEnv(limit=50)
    env = ChunkEnv(point, n_obs_steps=3)
    start = env.reset(0)["agent_pos"][:, 0]
    assert np.array_equal(start, [point.x] * 3)
    env_positions = [point.x]
    result = env.step_chunk(np.array([[0.1], [0.2]]))
    for action in (0.1, 0.2):
        env_positions.append(env_positions[-1] + 0.15 * action)
    assert np.allclose(result.observation["agent_pos"][:, 0], env_positions)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_actions_and_observations(bad):
    env = ChunkEnv(PointEnv())
    env.reset(0)
    with pytest.raises(UserError, match=r"--policy.path: the policy produced a NaN or Inf action"):
        env.step_chunk(np.full((2, 1), bad))
    poisoned = ChunkEnv(PointEnv(poison_at=2))
    poisoned.reset(0)
    with pytest.raises(UserError, match="NaN or Inf in its observation 'agent_pos'"):
        poisoned.step_chunk(STILL)


def roll(vec, chunks=6):
    out = [vec.reset({i: 100 + i for i in range(vec.num_envs)})]
    rng = np.random.default_rng(0)
    for step in range(chunks):
        action = {i: rng.uniform(-1, 1, (4, 4)).astype(np.float32) for i in range(vec.num_envs)}
        vec.send(action, {i: 200 + 10 * step + i for i in range(vec.num_envs)})
        out.append(vec.receive())
    return out


def test_workers_give_what_one_process_gives():
    config = MetaworldStateConfig(task="hammer-v3,push-v3", episode_length=10)
    with ChunkVectorEnv(config, 3, 0) as here, ChunkVectorEnv(config, 3, 2) as there:
        assert here.task_names == there.task_names == ["hammer-v3", "push-v3", "hammer-v3"]
        first, second = roll(here), roll(there)
    for i in range(3):
        assert np.array_equal(first[0][i]["environment_state"], second[0][i]["environment_state"])
    for ours, theirs in zip(first[1:], second[1:], strict=True):
        for i in range(3):
            a, b = ours[i], theirs[i]
            assert (a.steps, a.truncated, a.seed) == (b.steps, b.truncated, b.seed)
            assert np.array_equal(a.observation["environment_state"], b.observation["environment_state"])
    assert sum(result.truncated for step in second[1:] for result in step.values()) == 6
    assert [first[k][0].steps for k in (1, 2, 3)] == [4, 4, 2]


def test_action_of_another_shape():
    env = ChunkEnv(PointEnv())
    env.reset(0)
    with pytest.raises(UserError, match=r"makes actions of shape \(2,\), the environment takes \(1,\)"):
        env.step_chunk(np.zeros((4, 2)))


def test_errors_reach_the_parent():
    with ChunkVectorEnv(MetaworldStateConfig(task="hammer-v3"), 2, 1) as vec:
        vec.reset({0: 1, 1: 2})
        vec.send({0: np.full((4, 4), np.nan), 1: np.zeros((4, 4))}, {0: None, 1: None})
        with pytest.raises(UserError, match="NaN or Inf action"):
            vec.receive()
    with pytest.raises(UserError, match="no task 'nonsense-v3'"):
        ChunkVectorEnv(MetaworldStateConfig(task="nonsense-v3"), 2, 1)


def test_a_dead_worker_is_named():
    with ChunkVectorEnv(MetaworldStateConfig(task="hammer-v3"), 2, 1) as vec:
        vec.reset({0: 1, 1: 2})
        vec._workers[0].process.kill()
        with pytest.raises(RuntimeError, match="the worker of environments 0-1 died"):
            vec.send({0: np.zeros((4, 4)), 1: np.zeros((4, 4))}, {0: None, 1: None})
            vec.receive()


def test_sending_twice_is_a_mistake():
    with ChunkVectorEnv(PointConfig(), 1, 0) as vec:
        vec.reset({0: 1})
        vec.send({0: STILL}, {0: None})
        with pytest.raises(RuntimeError, match="still stepping"):
            vec.send({0: STILL}, {0: None})


@pytest.mark.parametrize("workers", [0, 2])
def test_who_waits_for_whom(workers):
    """Simulators of 2 x 10 ms for a chunk: what the caller takes beyond that is their wait."""
    with ChunkVectorEnv(FaultyConfig(slow=0.01), 4, workers) as vec:
        vec.reset({i: i for i in range(4)})
        chunks = {i: np.zeros((2, 1), np.float32) for i in range(4)}
        work = 0.08 if workers == 0 else 0.04  # one after another, or two at a time
        vec.send(chunks, dict.fromkeys(chunks))
        vec.receive()
        assert vec.busy >= work and vec.idle < 0.05
        started = time.perf_counter()
        vec.send(chunks, dict.fromkeys(chunks))
        time.sleep(work + 0.3)
        vec.receive()
        assert vec.busy >= work and vec.idle > 0.2
        assert vec.busy + vec.idle <= time.perf_counter() - started
