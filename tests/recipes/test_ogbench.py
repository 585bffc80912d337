"""OGBench's tasks: what `--env.type=gym` makes of them, and who demonstrates them."""

from dataclasses import replace

import numpy as np
import pytest
from lerobot.envs.utils import preprocess_observation

from trimtab.rl.envs.gym import GymConfig
from trimtab.rl.envs.hooks import for_policy, make_chunk_env
from trimtab.rl.rendering import choose_gl_backend

choose_gl_backend()  # as a command does, before a simulator is imported
pytest.importorskip("ogbench", reason="uv pip install 'lerobot_policy_trimtab[ogbench]'")
from trimtab.recipes.embedded_base import ogbench as suite  # noqa: E402

FEATURES = "observation.state", "observation.environment_state"
SHAPES = {"cube-single": (200, 28), "scene": (750, 40)}  # time limit, numbers in an observation
SEED = suite.SEED_OFFSET


def demonstrations(name, seed=0, **changes):
    """A blind demonstration and a careful one of the same start."""
    return list(suite.demonstrate(name, 2, seed, replace(suite.OPERATORS[name], **changes)))


@pytest.mark.parametrize("name", suite.TASKS)
def test_a_careful_operator_succeeds_a_blind_one_does_not(name):
    for seed in range(2):
        blind, careful = demonstrations(name, seed, offset=0.1)
        assert all(np.array_equal(blind[0][key], careful[0][key]) for key in FEATURES)
        assert careful[-1]["next.success"][0] and careful[-1]["next.done"][0]
        assert not any(frame["next.success"][0] or frame["next.done"][0] for frame in careful[:-1])
        assert len(blind) == suite.OPERATORS[name].patience and not blind[-1]["next.success"][0]
        assert blind[-1]["next.done"][0]


@pytest.mark.parametrize("name", suite.TASKS)
def test_the_environment_plays_a_demonstration_again(name):
    """As steering does: the policy's features, success, the time limit, clipped actions, the same episode."""
    limit, width = SHAPES[name]
    frames = demonstrations(name)[1]
    options = {key: value for key, value in suite.TASKS[name].env.items() if key != "type"}
    env = make_chunk_env(for_policy(GymConfig(**options), dict.fromkeys(FEATURES, (width,))), 0)
    assert env.limit == limit
    actions = np.stack([frame["action"] for frame in frames])
    beyond = np.where(np.abs(actions) == 1.0, 3.0 * actions, actions)
    assert (beyond != actions).any()
    for played in (actions, beyond):  # the second time after an episode of another seed
        env.reset(SEED + 7)
        seen = preprocess_observation({key: entry[0] for key, entry in env.reset(SEED).items()})
        for key in FEATURES:
            assert np.array_equal(seen[key][0].numpy(), frames[0][key])
        result = env.step_chunk(played)
        assert result.terminated and list(result.successes) == [bool(f["next.success"][0]) for f in frames]
        assert np.allclose(result.rewards, [frame["next.reward"][0] for frame in frames])


def test_the_side_of_the_blind_spot_depends_on_the_cube():
    rng, operator = np.random.default_rng(0), suite.OPERATORS["cube-single"]
    errors = [operator.error(yaw, rng) for yaw in (0.3, -0.3, 3.0)]
    assert [np.sign(error[1]) for error in errors] == [1, 1, -1]
    assert all(0.08 <= abs(error[1]) <= 0.13 and error[0] == error[2] == 0 for error in errors)
