"""A processor step of the embedded arm's base, saved with it."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lerobot.configs import FeatureType, PipelineFeatureType, PolicyFeature
from lerobot.processor import ObservationProcessorStep
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE


@dataclass
class StateAsEnvironmentState(ObservationProcessorStep):
    """Gives the state a second time, as the environment's, where there is none.

    LeRobot's DiffusionPolicy wants a camera or an environment's state, and a robot has no such state. Not
    registered under a name: it is found by its path, by whatever loads the base.
    """

    makes: ClassVar[tuple[str, ...]] = (OBS_ENV_STATE,)

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        return {OBS_ENV_STATE: observation[OBS_STATE]} | observation

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        seen = features[PipelineFeatureType.OBSERVATION]
        made = {OBS_ENV_STATE: PolicyFeature(FeatureType.ENV, seen[OBS_STATE].shape)}
        return {**features, PipelineFeatureType.OBSERVATION: made | seen}
