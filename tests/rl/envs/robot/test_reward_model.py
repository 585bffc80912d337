"""Success by LeRobot's reward classifier: a small instance of its own class, with a small ResNet below."""

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.rewards.classifier import Classifier, RewardClassifierConfig, make_classifier_processor
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import resize
from transformers import ResNetConfig, ResNetModel

from tests.helpers.robots import START, free_port, robot_config, station_thread
from trimtab.adapters import UserError
from trimtab.recipes.embedded_arm.arm import MujocoArmConfig
from trimtab.rl.envs.robot.config import RewardModelOptions
from trimtab.rl.envs.robot.episodes import EpisodeRecord
from trimtab.rl.envs.robot.reward_model import RewardModel
from trimtab.rl.envs.robot.vector import RobotVectorEnv

FRONT = "observation.images.front"
BLANK = {FRONT: np.zeros((48, 48, 3), np.uint8)}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A classifier in a folder, whose answer leans by ``bias``."""
    backbone = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    small = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(small).save_pretrained(backbone)

    def saved(bias=0.0, **options):
        folder = tmp_path_factory.mktemp("classifier")
        known = {
            "num_cameras": 1,
            "hidden_dim": 8,
            "latent_dim": 8,
            "model_name": str(backbone),
            "device": "cpu",
        }
        features = {FRONT: PolicyFeature(FeatureType.VISUAL, (3, 32, 32))}
        config = RewardClassifierConfig(input_features=features, **{**known, **options})
        model = Classifier(config)
        torch.nn.init.constant_(model.classifier_head[-1].bias, bias)
        model.save_pretrained(folder)
        stats = {FRONT: {"mean": torch.full((3, 1, 1), 0.4), "std": torch.full((3, 1, 1), 0.2)}}
        make_classifier_processor(config, stats)[0].save_pretrained(folder)
        return folder, model.eval()

    return saved


def test_it_sees_what_the_classifier_was_trained_on(make):
    folder, model = make()
    seen = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    image = resize(torch.from_numpy(seen).permute(2, 0, 1)[None] / 255, [32, 32], antialias=True)
    with torch.no_grad():
        expected = model.predict([(image - 0.4) / 0.2]).probabilities.item()
        unlike = model.predict([image]).probabilities.item()
    found = RewardModel(str(folder), BLANK)({FRONT: seen})
    assert found == pytest.approx(expected, abs=1e-4) and found != pytest.approx(unlike, abs=1e-3)


def test_what_cannot_judge_is_refused_in_one_line(make, tmp_path):
    folder, _ = make()
    with pytest.raises(UserError, match=r"wants observation.images.front; the robot's cameras are none"):
        RewardModel(str(folder), {})
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.startswith("classifier_head"))
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"lacks weights: {name}"):
        RewardModel(str(folder), BLANK)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"--robot.reward_model.path: .* cannot be used") as raised:
        RewardModel(str(folder), BLANK)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"cannot be used: config.json not found"):
        RewardModel(str(tmp_path), BLANK)
    with pytest.raises(UserError, match="not a reward_classifier of 2 classes"):
        RewardModel(str(make(num_classes=3)[0]), BLANK)
    with pytest.raises(UserError, match=r"reward_model.threshold: is between 0 and 1"):
        RewardModelOptions(threshold=80.0)


@pytest.mark.parametrize(
    "bias, said, outcome", [(9, {}, "success"), (-9, {}, "running"), (9, {"5": "failure"}, "failure")]
)
def test_it_ends_an_episode_where_nobody_has(make, tmp_path, bias, said, outcome):
    listen = f"127.0.0.1:{free_port()}"
    arm = MujocoArmConfig(id="judged", clock="step", camera=True, pixels=48)
    judge = RewardModelOptions(str(make(float(bias))[0]))
    config = robot_config(robot=arm, listen=listen, token="word", reward_model=judge)
    config.person_options = {"script": {"0": said}}
    with station_thread(config, listen, "word", again=True) as raised, RobotVectorEnv(config, 1) as vec:
        vec.keep(tmp_path)
        vec.reset({0: 1})
        vec.send({0: np.tile(np.array([*START.values()]), (5, 1))}, {0: 2})
        result = vec.receive()[0]
    assert not raised and (result.terminated, result.ended) == (outcome == "success", outcome != "running")
    if outcome != "running":
        record = EpisodeRecord.read(tmp_path / "000000")
        assert (record.outcome, record.why) == (outcome, "reward model: 1.00" if outcome == "success" else "")
