"""A Gymnasium environment in a file of the user's, a policy by lerobot-train, then trimtab's commands."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers import lerobot_commands, reach
from tests.helpers.small_runs import HERE, SMALL, check_results
from trimtab.recipes.cli import main

TRAIN = (
    "--policy.type=diffusion --policy.push_to_hub=false --policy.device=cpu --wandb.enable=false "
    "--dataset.repo_id=me/reach --num_workers=0 --steps=20 --batch_size=8 "
    "--policy.n_obs_steps=1 --policy.horizon=8 --policy.n_action_steps=4 --policy.drop_n_last_frames=0 "
    "--policy.down_dims=[16,32] --policy.diffusion_step_embed_dim=16 --policy.noise_scheduler_type=DDIM "
    "--policy.num_train_timesteps=50 --policy.num_inference_steps=4 --policy.optimizer_lr=2e-3 "
    "--policy.scheduler_warmup_steps=10"
)
ENV = ["--env.type=gym", "--env.factory=reach:make", "--env.fps=10"]
FEW = ["--eval.n_episodes=4", "--eval.constant_candidates=2", "--eval.constant_episodes=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: the simulator's file, a dataset of it, a policy trained by lerobot-train."""
    from lerobot.scripts import lerobot_train

    folder = tmp_path_factory.mktemp("own")
    shutil.copy(reach.__file__, folder / "reach.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        reach.demonstrate("data", episodes=8)
        options = [*TRAIN.split(), "--dataset.root=data", "--output_dir=base"]
        lerobot_commands.run(lerobot_train.main, options, patch)
        yield folder


@pytest.fixture(scope="module")
def policy(folder):
    return f"--policy.path={folder / 'base/checkpoints/last/pretrained_model'}"


def run(command, *options):
    assert main([command, *options]) == 0


def test_it_is_probed_steered_evaluated_and_exported(folder, policy, capsys):
    known = [*ENV, "--env.success=terminated", policy]
    run("probe", *known, HERE, *FEW, "--output_dir=probe")
    assert "environment: gym, reach:make" in capsys.readouterr().out
    run("adapt", *known, *SMALL, "--output_dir=steered")  # in workers, which find the file as well
    results = check_results(Path("steered"), ["base", "zero_noise", "constant_noise", "steered"], 6)
    assert results["policies"]["base"]["return_mean"] < 0
    run(
        "eval",
        "--policy.path=steered/artefact",
        *ENV,
        HERE,
        "--env.success=terminated",
        *FEW,
        "--output_dir=ev",
    )
    run("export", "--run=steered", "--output_dir=artefact")


def test_without_success_returns_are_compared(folder, policy, capsys):
    options = [*ENV, policy, HERE, "--train.reward=env", *SMALL]
    run("adapt", *options, "--env.success=none", "--output_dir=returns")
    results = json.loads(Path("returns/results.json").read_text())
    # Twice what the base's episodes showed: no step is further than 4 from the goal, or rewarded.
    low, high = results["train"]["reward_range"]
    assert -8.0 < low < -0.3 and high == 0.0
    for entry in results["policies"].values():
        assert entry["success_rate"] is None and entry["successes"] is None
        low, high = entry["return_ci95"]
        assert low <= entry["return_mean"] <= high < 0
    text = capsys.readouterr().out
    assert "return" in text and "0.0 %" not in text
    # A name that info does not hold.
    run("eval", *ENV, policy, HERE, "--env.success=info.solvd", *FEW, "--output_dir=misspelt")
    said = capsys.readouterr().out
    assert "warning: --env.success: info.solvd was not there in 4 episodes, whose info held distance" in said
    # Where nothing is said of success, the command says what there is to choose from.
    assert main(["adapt", *ENV, policy, *SMALL, "--output_dir=refused"]) == 2
    assert "--env.success" in capsys.readouterr().err


def test_it_learns_from_a_dataset_without_a_simulator_and_goes_on_in_one(folder, policy, capsys):
    learner = [one for one in SMALL if "--rl." not in one and "--eval" not in one and "num_envs" not in one]
    few = [
        *learner,
        "--rl.type=best_of_n",
        "--rl.num_candidates=2",
        "--rl.target_candidates=2",
        "--rl.batch_size=16",
        HERE,
    ]
    run(
        "adapt",
        *few,
        policy,
        "--demos.root=data",
        "--demos.success=end",
        "--train.env_steps=0",
        "--train.offline_updates=20",
        "--train.reward=env",
        "--output_dir=offline",
    )
    said = "".join(capsys.readouterr())
    assert "demonstrations: " in said and "frames a second" not in said, "there is no environment"
    results = json.loads(Path("offline/results.json").read_text())
    assert results["policies"] == {} and results["updates"] == 20
    low, high = rewards = results["train"]["reward_range"]  # twice those of the dataset
    assert -8.0 < low < -0.3 and high == 0.0
    assert Path("offline/artefact/model.safetensors").is_file()
    more = [*ENV, "--env.success=terminated", HERE, "--eval.n_episodes=2", "--eval.constant_candidates=0"]
    run("eval", "--policy.path=offline/artefact", *more, "--output_dir=offline_ev")
    online = [*more, "--train.env_steps=40", "--num_envs=2", "--eval.videos=0"]
    capsys.readouterr()
    run("adapt", "--resume=true", "--output_dir=offline", *online)
    assert "cannot repeat" not in "".join(capsys.readouterr()), "it is asked, though a dataset was not"
    lines = Path("offline/metrics.jsonl").read_text().splitlines()
    assert not any("faults" in json.loads(line) for line in lines)
    results = json.loads(Path("offline/results.json").read_text())
    assert list(results["policies"]) == ["base", "zero_noise", "steered"] and results["env_steps"] >= 40
    assert results["train"]["reward_range"] == rewards, "what was learnt is in their units"
