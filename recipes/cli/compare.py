"""`trimtab compare`: runs what is missing, or reads run folders, and reports."""

from trimtab.adapters import UserError
from trimtab.recipes.compare.comparison import Comparison
from trimtab.recipes.compare.config import CompareConfig
from trimtab.recipes.compare.folders import read_runs
from trimtab.recipes.compare.report import write_report
from trimtab.recipes.compare.runs import SAME_COMMAND
from trimtab.recipes.support.console import new_output_dir
from trimtab.recipes.support.run_folder import run_errors
from trimtab.rl.envs.hooks import refuse_attended


def main(config: CompareConfig) -> None:
    if config.runs:
        report_folders(config)
        return
    if not config.policy.path:
        raise UserError("--policy.path", "name the base policy, or with --runs=[...] folders to report on")
    if config.env is None:
        raise UserError("--env.type", "name the environment, for instance --env.type=metaworld_state")
    refuse_attended(config.env, "compare in a simulator, or use `trimtab adapt` and `trimtab eval`")
    comparison = Comparison(config)
    with run_errors(comparison.output, SAME_COMMAND):
        if config.only:
            comparison.only(config.only)
        else:
            print(comparison.all())


def report_folders(config: CompareConfig) -> None:
    """Report on runs that are there."""
    runs, videos = read_runs([path.expanduser() for path in config.runs])
    output = new_output_dir(config.output_dir, "compare")
    facts = [
        f"{len(config.runs)} run folders: {', '.join(str(path) for path in config.runs)}",
        "while learning, success is that of the last training episodes (adapt) or of each round's evaluation "
        "(lora): curves and steps to a level of the two kinds are not alike",
    ]
    compared = config.improved, config.reach
    text = write_report(output, "Comparison of runs", facts, runs, videos, compared)
    print(f"{text}\nall in {output}")
