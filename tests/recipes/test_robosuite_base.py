"""The operators of robomimic's tasks, and a base made of them."""

import json
import shlex

import numpy as np
import pytest
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE

from trimtab.recipes.cli import main
from trimtab.rl.rendering import choose_gl_backend

choose_gl_backend()  # as a command does, before a simulator is imported
pytest.importorskip("robosuite")


@pytest.mark.parametrize("task", ["Lift", "Can"])
def test_a_careful_operator_succeeds_and_a_careless_one_does_not(task):
    from trimtab.recipes.embedded_base.robosuite import OPERATORS, perform
    from trimtab.rl.envs.robosuite import make

    env, operator, won = make(task), OPERATORS[task], []
    for take in (0, 1):
        episodes = [list(perform(env, operator, seed, take)) for seed in range(4)]
        won.append(sum(bool(frames[-1]["next.success"][0]) for frames in episodes))
        assert all(frames[-1]["next.done"][0] and len(frames) <= operator.steps for frames in episodes)
    assert won[0] <= 1 and won[1] >= 3


def test_who_is_careless_cannot_be_seen_at_the_start():
    from trimtab.recipes.embedded_base.robosuite import OPERATORS, demonstrate

    takes = OPERATORS["Lift"].takes
    starts = [frames[0] for frames in demonstrate("Lift", takes + 1, seed=0)]
    seen = [np.concatenate([start[OBS_STATE], start[OBS_ENV_STATE]]) for start in starts]
    assert all(np.array_equal(seen[0], again) for again in seen[1:takes]) and (seen[0] != seen[takes]).any()
    assert len({tuple(start[ACTION]) for start in starts}) == takes + 1


def test_a_blind_spot_is_towards_the_middle():
    from trimtab.recipes.embedded_base.robosuite import OPERATORS

    operator, rng = OPERATORS["Can"], np.random.default_rng(0)
    for x, side in ((-0.02, 1.0), (0.2, -1.0)):
        error = operator.error(np.array([x, -0.3, 0.86]), rng)
        assert 0.8 <= side * error[0] / operator.offset <= 1.3 and not error[1:].any()


def test_a_base_is_made_and_acts(tmp_path, capsys):
    argv = ["base", "--suite=robosuite", "--tasks=Lift", "--episodes=2", "--cloning.steps=2", "--threads=1"]
    assert main([*argv, f"--output_dir={tmp_path}"]) == 0
    made = json.loads((tmp_path / "Lift" / "base.json").read_text())
    assert made["env"]["kwargs"] == {"task": "Lift"} and 0.0 <= made["demonstrated"] <= 1.0
    said = capsys.readouterr().out.splitlines()
    command = shlex.split(next(line for line in said if line.strip().startswith("trimtab eval")))[1:]
    few = ["--eval.n_episodes=1", "--eval.constant_candidates=0", "--eval.videos=0", "--machine.workers=0"]
    limits = ["--eval.batch_size=1", "--env.episode_length=8", f"--output_dir={tmp_path / 'eval'}"]
    assert main([*command, *few, *limits]) == 0
    found = json.loads((tmp_path / "eval" / "results.json").read_text())["policies"]["base"]
    assert found["success_rate"] == 0.0
