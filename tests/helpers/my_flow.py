"""A flow-matching policy that is not LeRobot's: all that LeRobot needs to know one, in one module.

LeRobot finds policy class and processors by name in the module of the config class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.optim import AdamConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import make_default_pre_post_processors
from torch import Tensor, nn

STATE_DIM, ACTION_DIM = 3, 2


@PreTrainedConfig.register_subclass("my_flow")
@dataclass
class MyFlowConfig(PreTrainedConfig):
    horizon: int = 6
    n_action_steps: int = 4
    width: int = 64
    num_steps: int = 5
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {"STATE": NormalizationMode.MEAN_STD, "ACTION": NormalizationMode.MEAN_STD}
    )

    observation_delta_indices = None
    reward_delta_indices = None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.horizon))

    def validate_features(self) -> None:
        pass

    def get_optimizer_preset(self) -> AdamConfig:
        return AdamConfig(lr=1e-3)

    def get_scheduler_preset(self) -> None:
        return None


class MyFlowPolicy(PreTrainedPolicy):
    config_class = MyFlowConfig
    name = "my_flow"

    def __init__(self, config: MyFlowConfig, **kwargs: Any) -> None:
        super().__init__(config)
        chunk = config.horizon * config.action_feature.shape[0]
        self.encoder = nn.Sequential(
            nn.Linear(config.robot_state_feature.shape[0], config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.width),
        )
        self.head = nn.Sequential(
            nn.Linear(config.width + chunk + 1, config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.width),
            nn.SiLU(),
            nn.Linear(config.width, chunk),
        )
        self.reset()

    def velocity(self, context: Tensor, x: Tensor, time: Tensor) -> Tensor:
        flat = torch.cat([context, x.flatten(1), time.expand(len(x), 1)], -1)
        return self.head(flat).view_as(x)

    def integrate(self, context: Tensor, x: Tensor) -> Tensor:
        for step in range(self.config.num_steps):
            time = torch.full((len(x), 1), step / self.config.num_steps, device=x.device)
            x = x + self.velocity(context, x, time) / self.config.num_steps
        return x

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        action = batch["action"]
        noise, time = torch.randn_like(action), torch.rand(len(action), 1, device=action.device)
        blend = noise + time.unsqueeze(-1) * (action - noise)
        velocity = self.velocity(self.encoder(batch["observation.state"]), blend, time)
        return (velocity - (action - noise)).square().mean(), None

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        state = batch["observation.state"]
        shape = (len(state), self.config.horizon, self.config.action_feature.shape[0])
        return self.integrate(self.encoder(state), torch.randn(shape, device=state.device))

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        if not self._queue:
            chunk = self.predict_action_chunk(batch)[:, : self.config.n_action_steps]
            self._queue = list(chunk.unbind(1))
        return self._queue.pop(0)

    def reset(self) -> None:
        self._queue: list[Tensor] = []

    def get_optim_params(self) -> Any:
        return self.parameters()


def make_my_flow_pre_post_processors(config: MyFlowConfig, dataset_stats: Any = None) -> tuple[Any, Any]:
    return make_default_pre_post_processors(config, dataset_stats)


def features() -> dict[str, dict[str, PolicyFeature]]:
    """Config fields: a state in, an action out."""
    return {
        "input_features": {"observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,))},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
    }
