"""The fault campaign of `python -m tests.benchmarks.faults`, shortened."""

from tests.benchmarks.faults import Run, campaign_kills, differences


def test_killed_at_random_instants_a_run_is_the_run_that_was_not(tmp_path):
    counts, odd = campaign_kills(tmp_path, 6, seed=1)
    assert odd == []
    assert counts["kills"] >= 6 and counts["runs compared"] >= 3
    assert counts["of a run that had gone on"] >= 2 and counts["with progress"] >= 2


def test_the_comparison_would_see_a_difference(tmp_path):
    runs = [Run(tmp_path / name, env_steps=steps) for name, steps in (("a", 300), ("b", 300), ("c", 320))]
    for run in runs:
        run.folder.mkdir()
        run()
    assert differences(runs[0], runs[1]) == []
    assert {"weights", "metrics"} <= set(differences(runs[0], runs[2]))
