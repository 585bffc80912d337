"""Settings of DSRL's own code (arXiv 2506.15799, ``ajwagen/dsrl``), by algorithm.

Each table holds every option of a steering run that takes part, as ``trimtab adapt`` names it. Widths and
warm-up vary between the reference's benchmarks (the table in ``paper.md``); these are the narrowest
networks and the shortest warm-up that it uses, and its README's advice for a new task (bound 1.5, 20 gradient
steps per step of 4 environments). ``unit`` and ``log_std_clamp`` are the conventions of its SAC, which is
Stable-Baselines3's. Its bugs are not reproduced: its ``dsrl_na`` ignores the bound.
"""

from __future__ import annotations

from typing import Any

NETWORK = {"hidden": 128, "layers": 3, "activation": "tanh", "layer_norm": True}

SHARED: dict[str, Any] = {
    "rl": {
        "gamma": 0.99,
        "discount_per": "chunk",
        "bootstrap_at_time_limit": False,
        "n_step": 1,
        "batch_size": 256,
        "actor": {
            **NETWORK,
            "log_std_min": -20.0,
            "log_std_max": 2.0,
            "log_std_clamp": True,
            "mean_limit": 1.0,
        },
        "critic": {**NETWORK, "members": 2},
        "learning_rate": 3e-4,
        "tau": 0.005,
        "actor_every": 1,
        "initial_temperature": 1.0,
        "learn_temperature": True,
        "target_entropy": 0.0,
        "backup_entropy": True,
        "clip_targets": False,
    },
    "noise": {"type": "full", "bound": 1.5, "unit": "bound"},
    "train": {
        "env_steps": 300_000,
        "reward": "sparse",
        "warmup_transitions": 6004,  # 1501 steps of 4 environments
        "first_update": 6004,
        "catch_up": False,
        "updates_per_transition": 5.0,  # 20 per step of 4 environments
    },
    "num_envs": 4,
}

# For 20 updates, 10 distillation steps with one fresh noise per state.
NA = {"mode": "exact", "distillation_steps": 0.5, "distilled_pairs": 1, "regularizer": "entropy"}

PAPER: dict[str, dict[str, Any]] = {
    "dsrl_sac": SHARED,
    "dsrl_na": {**SHARED, "rl": {**SHARED["rl"], **NA}},
}

# What goes with an algorithm unless it is said otherwise: a golden ticket is one noise for all observations.
IMPLIED_DEFAULTS: dict[str, dict[str, Any]] = {"golden_ticket": {"noise": {"type": "constant"}}}
