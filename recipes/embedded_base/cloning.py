"""Behaviour cloning of a state-based LeRobot DiffusionPolicy from a LeRobotDataset."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE
from torch import Tensor

from trimtab.adapters.errors import UserError, at_least
from trimtab.recipes.finetune.data import ColumnWindows
from trimtab.rl.runs.progress import Progress

COLUMNS = (OBS_STATE, OBS_ENV_STATE, ACTION)
NARROW = 1e-3  # a coordinate that moved less than this in all demonstrations counts as constant


@dataclass
class CloningConfig:
    """Architecture and training of the embedded generalist.

    The sizes are what a CPU trains in about a minute. ``prediction_type="sample"`` with 5 DDIM steps
    keeps the modes that epsilon prediction loses at so few steps.
    """

    # Gradient steps.
    steps: int = 5000
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-6
    # Decay of the exponential moving average of the weights, which is what gets saved.
    ema: float = 0.995
    # Channels of the U-Net; each entry after the first halves the time axis once.
    down_dims: tuple[int, ...] = (64,)
    # Actions generated and executed per chunk.
    horizon: int = 8
    n_action_steps: int = 4
    num_inference_steps: int = 5

    def check(self) -> None:
        """Raise a ``UserError`` for a number out of range."""
        at_least(1, self, "--cloning.", "steps", "batch_size", "num_inference_steps", "n_action_steps")
        if self.n_action_steps > self.horizon:
            raise UserError("--cloning.n_action_steps", f"cannot exceed --cloning.horizon={self.horizon}")
        dims, factor = self.down_dims, 2 ** len(self.down_dims)
        if not dims or any(dim < 8 or dim % 8 for dim in dims):
            raise UserError("--cloning.down_dims", f"needs positive multiples of 8, got {list(dims)}")
        if self.horizon % factor:
            raise UserError("--cloning.horizon", f"must be a multiple of {factor} (2 per down_dims entry)")


def training_windows(dataset: Any, policy_config: Any, preprocessor: Any) -> ColumnWindows:
    """The training batches of a LeRobotDataset, by frame, normalised by ``preprocessor`` once for all."""
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    deltas = resolve_delta_timestamps(policy_config, dataset.meta)
    windows = ColumnWindows(LeRobotDataset(dataset.repo_id, root=dataset.root, delta_timestamps=deltas))
    normalised = preprocessor({key: windows.columns[key] for key in COLUMNS})
    windows.columns |= {key: normalised[key] for key in COLUMNS}
    return windows


def widened(stats: dict[str, dict[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Dataset statistics with a range of at least 1 for coordinates that never moved.

    LeRobot divides by max - min. A coordinate that stood still to the micrometre would turn a
    harmless deviation at run time into an input in the thousands.
    """
    wide = {key: {name: np.array(value) for name, value in entry.items()} for key, entry in stats.items()}
    for key in COLUMNS:
        narrow = (wide[key]["max"] - wide[key]["min"]) < NARROW
        wide[key]["min"][narrow] -= 0.5
        wide[key]["max"][narrow] += 0.5
    return wide


def make_policy(dataset_meta: Any, config: CloningConfig) -> tuple[Any, Any, Any]:
    """Build LeRobot's DiffusionPolicy and its processors for the dataset's features.

    Returns:
        (policy, preprocessor, postprocessor)
    """
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.utils.feature_utils import dataset_to_policy_features

    features, by_range = dataset_to_policy_features(dataset_meta.features), NormalizationMode.MIN_MAX
    policy_config = DiffusionConfig(
        input_features={k: f for k, f in features.items() if f.type is not FeatureType.ACTION},
        output_features={k: f for k, f in features.items() if f.type is FeatureType.ACTION},
        device="cpu",
        push_to_hub=False,
        n_obs_steps=1,
        horizon=config.horizon,
        n_action_steps=config.n_action_steps,
        down_dims=tuple(config.down_dims),
        kernel_size=3,
        diffusion_step_embed_dim=32,
        noise_scheduler_type="DDIM",
        num_train_timesteps=50,
        num_inference_steps=config.num_inference_steps,
        prediction_type="sample",
        # LeRobot's default mapping has no ENV entry and would leave the environment state raw.
        normalization_mapping={"STATE": by_range, "ENV": by_range, "ACTION": by_range},
    )
    policy = DiffusionPolicy(policy_config)
    pre, post = make_pre_post_processors(policy_config, dataset_stats=widened(dataset_meta.stats))
    return policy, pre, post


def clone(dataset: Any, config: CloningConfig, seed: int) -> tuple[Any, Any, Any, list[float]]:
    """Behaviour-clone ``dataset`` and return (policy with averaged weights, processors, loss curve).

    Args:
        dataset: a LeRobotDataset with ``observation.state`` and ``observation.environment_state``.
        config: architecture and training length.
        seed: seeds the weights and the batches.
    """
    torch.manual_seed(seed)
    policy, pre, post = make_policy(dataset.meta, config)
    windows = training_windows(dataset, policy.config, pre)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    weights = list(policy.parameters())
    averaged = [weight.detach().clone() for weight in weights]
    policy.train()
    history: list[Tensor] = []
    progress = Progress(range(1, config.steps + 1), desc="behaviour cloning", unit="step")
    for step in progress:
        loss, _ = policy.forward(windows[torch.randint(len(windows), (config.batch_size,))])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(averaged, [weight.detach() for weight in weights], 1.0 - config.ema)
        history.append(loss.detach())
        if step % 100 == 0:
            progress.set_postfix_str(f"loss {torch.stack(history[-100:]).mean():.4f}")
    with torch.no_grad():
        torch._foreach_copy_(weights, averaged)
    policy.eval()
    return policy, pre, post, [float(part.mean()) for part in torch.stack(history).split(100)]
