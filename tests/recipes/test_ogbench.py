"""OGBench's tasks: what `--env.type=gym` makes of them, and who demonstrates them."""

from dataclasses import replace

import numpy as np
import pytest
from lerobot.envs.utils import preprocess_observation

from trimtab.rl.envs.examine import describe, examine
from trimtab.rl.envs.hooks import for_policy, make_chunk_env

pytest.importorskip("ogbench", reason="uv pip install 'lerobot_policy_trimtab[ogbench]'")
from trimtab.recipes.embedded_base.ogbench import OPERATORS, TASKS, demonstrate
from trimtab.rl.envs.gym import GymConfig

STEPS = {"cube-single": (200, 28), "scene": (750, 40)}


def played(name, seed, **changes):
    """The frames of a demonstration, with the operator changed."""
    return next(demonstrate(name, 1, seed, replace(OPERATORS[name], **changes)))


@pytest.mark.parametrize("name", TASKS)
def test_the_environment_is_ogbenchs_and_repeats_an_episode(name):
    limit, width = STEPS[name]
    frames, features = played(name, 0), {}
    for key in ("observation.state", "observation.environment_state"):
        features[key] = (width,)
    config = GymConfig(**{key: value for key, value in TASKS[name].env.items() if key != "type"})
    env = make_chunk_env(for_policy(config, features), 0)
    assert env.limit == limit and config.fps == TASKS[name].fps == 20
    first = env.reset(50_000_000)
    seen = preprocess_observation({key: value for key, value in first.items()})
    for key in features:
        assert np.allclose(seen[key].numpy().ravel(), frames[0][key], atol=1e-6), key
    actions = np.stack([frame["action"] for frame in frames])
    result = env.step_chunk(actions * [2, 2, 2, 2, 2] if False else actions, None)
    assert list(result.successes) == [bool(frame["next.success"][0]) for frame in frames]
