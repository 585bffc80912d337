"""Multi-task DiT: flow matching by Euler and by Runge-Kutta, DDIM, and DDPM as the adapter switches it."""

import torch

from tests.helpers.adapter_cases import Case
from trimtab.adapters.lerobot.injection import NoiseInjector


def stepwise(adapter, batch, noise):
    """LeRobot's policy stepped as lerobot-eval does: its queues hold the history and the chunk."""
    policy = adapter.policy
    policy.reset()
    for time in range(adapter.n_obs_steps):
        policy._queues["action"].clear()
        observation = {key: value[:, time] for key, value in batch.items()}
        with NoiseInjector(noise) as injector:
            actions = [policy.select_action(dict(observation))]
        assert injector.hits == 1
    actions += [policy.select_action(dict(observation)) for _ in range(adapter.chunk_shape[0] - 1)]
    return torch.stack(actions, 1)


CASES = [
    Case("multi_task_dit", stepwise),
    Case("multi_task_dit", stepwise, {"integration_method": "rk4", "cameras": 2}),
    Case(
        "multi_task_dit",
        stepwise,
        {"objective": "diffusion", "noise_scheduler_type": "DDIM", "num_inference_steps": 4},
    ),
    Case("multi_task_dit", stepwise, {"objective": "diffusion", "use_separate_rgb_encoder_per_camera": True}),
]
