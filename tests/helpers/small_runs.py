"""Options of a run of seconds, and what must hold of its results."""

import json

SMALL = [
    "--train.env_steps=120",
    "--train.warmup_transitions=10",
    "--train.first_update=8",
    "--train.log_every=30",
    "--rl.type=dsrl_sac",
    "--rl.batch_size=16",
    "--num_envs=2",
    "--eval.n_episodes=6",
    "--eval.batch_size=3",
    "--eval.constant_candidates=2",
    "--eval.constant_episodes=2",
    "--eval.videos=1",
    "--policy.device=cpu",
]
HERE = "--machine.workers=0"  # no processes of the simulators' own, which import for longer than they run
POLICIES = ["base", "zero_noise", "constant_noise", "steered"]


def check_results(folder, names, episodes):
    results = json.loads((folder / "results.json").read_text())
    assert list(results["policies"]) == names
    for entry in results["policies"].values():
        assert entry["episodes"] == episodes
        assert entry["success_rate"] == entry["successes"] / episodes
        low, high = entry["ci95"]
        assert 0 <= low <= entry["success_rate"] <= high <= 1
    return results
