"""What a launcher leaves in the environment of a plainly started command: one line, or no effect."""

import pytest

from tests.conftest import make_diffusion
from trimtab.adapters import UserError
from trimtab.recipes.cli import main
from trimtab.recipes.support.launched import check_launch, launched_processes, make_accelerator

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LEFT_OVER = {
    "size": ({"WORLD_SIZE": "2"}, "holds WORLD_SIZE=2, as a launcher sets it, but no RANK and no"),
    "rank": ({"RANK": "1"}, "but no WORLD_SIZE and no MASTER_ADDR"),
    "local rank": ({"LOCAL_RANK": "0"}, "unset LOCAL_RANK"),
    "no address": ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "but no MASTER_ADDR"),
    "words": ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: 'abc' in the environment is no number"),
    "negative": ({"WORLD_SIZE": "4", "RANK": "-1"}, "RANK: '-1' in the environment is no number"),
    "rank too high": (
        {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost"},
        "there is no process 2 of WORLD_SIZE=2",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", LEFT_OVER)
@pytest.mark.parametrize("command", ["adapt", "lora"])
def test_half_a_launch_is_one_line(name, command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    values, message = LEFT_OVER[name]
    for variable, value in values.items():
        monkeypatch.setenv(variable, value)
    assert main([command, "--env.type=pusht", "--policy.path=base"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert message in line and "accelerate launch" in line and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"RANK": ""}])
def test_one_process_needs_no_launcher(values, monkeypatch):
    for variable, value in values.items():
        monkeypatch.setenv(variable, value)
    check_launch()
    assert launched_processes() == 1 and make_accelerator("cpu").num_processes == 1


def test_lora_does_not_wait_for_processes_that_it_cannot_use(monkeypatch, tmp_path, capsys):
    for variable, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(variable, value)
    base = make_diffusion(tmp_path / "base")
    argv = ["lora", f"--policy.path={base}", "--policy.device=cpu", "--dataset.repo_id=a/b"]
    assert main([*argv, f"--output_dir={tmp_path / 'out'}"]) == 2
    assert "lora runs in one process, and WORLD_SIZE says there are more" in capsys.readouterr().err


def test_a_whole_launch_passes(monkeypatch):
    for variable, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(variable, value)
    check_launch()
    assert launched_processes() == 2
    with pytest.raises(UserError, match="no LOCAL_RANK and no MASTER_PORT"):
        check_launch(cpu=False)


@pytest.mark.parametrize(
    ("variable", "value"), [("ACCELERATE_USE_CPU", "maybe"), ("ACCELERATE_USE_DEEPSPEED", "true")]
)
def test_what_accelerate_finds_of_another_job(variable, value, monkeypatch, tmp_path, capsys):
    from accelerate.state import AcceleratorState

    monkeypatch.setenv(variable, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    base = make_diffusion(tmp_path / "base")
    argv = ["adapt", f"--policy.path={base}", "--policy.device=cpu", "--env.type=pusht"]
    argv += ["--env.obs_type=environment_state_agent_pos", "--eval.n_episodes=1", "--eval.videos=0"]
    argv += ["--train.env_steps=1", f"--output_dir={tmp_path / 'out'}"]
    try:
        assert main(argv) == 2
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert "accelerate: " in line and variable in line and "unset what is left over" in line
    assert not (tmp_path / "out").exists()
