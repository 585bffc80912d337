"""An environment from outside the package answers for its own tasks, base policies and chunks."""

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.lane import KNOWN, LaneConfig, LanesConfig, SuiteConfig, make_lane_policy
from trimtab.adapters import PolicyConfig, UserError
from trimtab.recipes.cli import main
from trimtab.recipes.support.session import open_session
from trimtab.recipes.support.shared_configs import EpisodesConfig, MachineConfig
from trimtab.rl.envs.hooks import base_tasks, check_base, task_names
from trimtab.rl.envs.vector import ChunkVectorEnv


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A policy for the lane that has only seen the near one."""
    folder = make_lane_policy(tmp_path_factory.mktemp("lane") / "base")
    (folder / KNOWN).write_text("near")
    return folder


def test_an_environment_without_tasks_of_its_own(base):
    config = LaneConfig()
    assert task_names(config) == [] and base_tasks(config, base) == []
    check_base(config, base)


def test_an_environment_with_tasks_of_its_own(base):
    config = LanesConfig(task="near,far")
    assert task_names(config) == ["near", "far"] and base_tasks(config, base) == ["near"]
    check_base(replace(config, task="near"), base)
    check_base(config, "ws://somewhere:8000")  # a server shows no folder
    with pytest.raises(UserError, match=r"--env.task: this base has never seen the lane 'far'"):
        check_base(config, base)
    with pytest.raises(UserError, match="--tasks: there is no lane 'moon'"):
        task_names(replace(config, task="moon"), "--tasks")


@pytest.mark.parametrize("workers", [0, 1])
def test_it_makes_its_own_chunk_wise_form(workers):
    right = np.array([[1, 0]] * 4, np.float32)
    with ChunkVectorEnv(LanesConfig(task="near,far"), 3, workers) as vec:
        assert vec.task_names == ["near", "far", "near"]
        vec.reset({0: 1, 1: 1})
        vec.send({0: right, 1: right}, {0: None, 1: None})
        assert [result.terminated for result in vec.receive().values()] == [True, False]
    with ChunkVectorEnv(LanesConfig(task="near"), 1, workers) as vec:
        vec.reset({0: 1})
        with pytest.raises(UserError, match=r"--policy.path: the policy is too fast for a lane"):
            vec.examine(99 * right, move=False)


def test_a_session_takes_its_tasks_one_by_one(base):
    several = LanesConfig(task="near,far")
    (base / KNOWN).write_text("near far")
    arguments = PolicyConfig(path=str(base), device="cpu"), several, EpisodesConfig(), MachineConfig(0)
    with pytest.raises(UserError, match=r"--env.task: only adapt takes several tasks"):
        open_session(*arguments)
    session, _ = open_session(*arguments, many=True)
    assert session.tasks == ["near", "far"]
    assert [vec.task_names[0] for _, vec in session.evaluations_by_task()] == ["near", "far"]
    (base / KNOWN).write_text("near")


@pytest.mark.parametrize(
    ("count", "many", "refused"),
    [
        (1, False, "--env.task: only adapt takes several tasks"),
        (4, False, "--env.task: only adapt takes several tasks"),
        (2, True, "--eval.batch_size: 'suite' has 3 tasks, 2 environments see 2 of them;"),
        (4, True, ""),
    ],
)
def test_no_task_of_a_suite_is_left_out(count, many, refused, base):
    """However few environments there are: the first would be taken for all of them."""
    episodes = EpisodesConfig(n_episodes=4, batch_size=count)
    policy = PolicyConfig(path=str(base), device="cpu")
    session, _ = open_session(policy, SuiteConfig(), episodes, MachineConfig(0), many=many)
    if refused:
        with pytest.raises(UserError, match=refused):
            next(session.evaluations_by_task())
    else:
        seen = [(task, {*vec.task_names}) for task, vec in session.evaluations_by_task()]
        assert seen == [(f"lane {n}", {f"lane {n}"}) for n in range(3)]


@pytest.mark.parametrize("command", ["probe", "eval", "adapt", "lora", "compare"])
def test_every_command_refuses_a_task_that_the_base_does_not_know(command, base, capsys, tmp_path):
    argv = [
        *(command, "--env.discover_packages_path=tests.helpers.lane", "--env.type=test_lanes"),
        *("--env.task=far", f"--policy.path={base}", "--policy.device=cpu"),
        f"--output_dir={tmp_path / 'out'}",
        *(["--from_rollouts=true"] if command == "lora" else []),
        *(["--methods=base"] if command == "compare" else []),
    ]
    assert main(argv) == 2
    assert "--env.task: this base has never seen the lane 'far'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
