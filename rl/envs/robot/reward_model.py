"""A LeRobot reward classifier that says success beside the person: ``--robot.reward_model.*``."""

from pathlib import Path

import numpy as np
import torch
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from safetensors.torch import load_model
from torch.nn.functional import interpolate

from trimtab.adapters.errors import UserError, reason

PREPROCESSOR = "classifier_preprocessor.json"  # as lerobot-train saves it
IMAGE = "observation.image"  # LeRobot's prefix


class RewardModel:
    """How probable success is, by what the cameras see.

    Args:
        path: a folder that ``lerobot-train --reward_model.type=reward_classifier`` has saved.
        blank: an observation of the robot, by LeRobot's feature names.

    Raises:
        UserError: it cannot be loaded, is of another type or wants cameras that the robot lacks.
    """

    def __init__(self, path: str, blank: dict[str, np.ndarray]) -> None:
        from lerobot.configs.rewards import RewardModelConfig
        from lerobot.processor import PolicyProcessorPipeline
        from lerobot.rewards.classifier import Classifier, RewardClassifierConfig

        option = "--robot.reward_model.path"
        if not Path(path).is_dir():
            raise UserError(option, f"{path} is no folder")
        try:
            config = RewardModelConfig.from_pretrained(path)
            if not isinstance(config, RewardClassifierConfig) or config.num_classes != 2:
                raise UserError(option, f"{path} holds a {config.type}, not a reward_classifier of 2 classes")
            self.features = {k: f.shape for k, f in config.input_features.items() if k.startswith(IMAGE)}
            if missing := {*self.features} - {*blank}:
                seen = ", ".join(sorted(key for key in blank if key.startswith(IMAGE))) or "none"
                said = f"{path} wants {', '.join(sorted(missing))}; the robot's cameras are {seen}"
                raise UserError(option, said)
            self.model = Classifier(config).to(config.device).eval()
            # Not strictly: what the encoders share is stored once, under any of its names.
            if lacking := load_model(self.model, Path(path) / SAFETENSORS_SINGLE_FILE, strict=False)[0]:
                raise UserError(option, f"{path} lacks weights: {', '.join(sorted(lacking)[:3])}")
            saved = (Path(path) / PREPROCESSOR).is_file()  # LeRobot's own step leaves it out
            self.preprocess = (
                PolicyProcessorPipeline.from_pretrained(path, config_filename=PREPROCESSOR) if saved else dict
            )
            self(blank)
        except UserError:
            raise
        except Exception as error:  # whatever LeRobot, the Hub and the backbone's code raise
            raise UserError(option, f"{path} cannot be used: {reason(error)}") from error

    @torch.no_grad()
    def __call__(self, seen: dict[str, np.ndarray]) -> float:
        """The probability, with images (H, W, 3) uint8, resized to what the model was trained on."""
        images = {}
        for key, (_, height, width) in self.features.items():
            image = torch.from_numpy(seen[key]).permute(2, 0, 1)[None].float() / 255
            images[key] = interpolate(image, (height, width), mode="bilinear", antialias=True)
        device, batch = next(self.model.parameters()).device, self.preprocess(images)
        return float(self.model.predict([batch[key].to(device) for key in self.features]).probabilities)
