"""Policies at their published size, with random weights or none: what encoding and denoising really cost.

``lingbot_va`` is left out: its 40 passes for the video and 50 for the actions take minutes to count.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.weightless import WithoutMemory, to_fake
from tests.helpers.tiny import backbones
from trimtab.adapters.config import PolicyConfig
from trimtab.adapters.loading import quietly
from trimtab.adapters.policy_adapter import PolicyAdapter
from trimtab.adapters.registry import adapter_class
from trimtab.adapters.tiny.parts import SIZES as NARROW
from trimtab.adapters.tiny.parts import (
    camera_features,
    make_backbone,
    make_florence,
    statistics,
    word_tokenizer,
)

Built = tuple[PolicyAdapter, dict[str, Any]]
CAMERA = (480, 640)  # pixels, unless a policy was trained on others
RUNNABLE = ("act", "diffusion", "pi0", "pi05", "smolvla")  # can be built with weights, too
# Of the backbones; the file says where each comes from.
SIZES: dict[str, dict[str, Any]] = {
    name: {key: value for key, value in sizes.items() if key != "source"}
    for name, sizes in json.loads(Path(__file__).with_name("published_sizes.json").read_text()).items()
}


def full_size(policy_type: str, device: str = "meta", cameras: int = 2) -> Built:
    """An adapter at published size, and a preprocessed batch of one observation.

    Args:
        policy_type: a key of ``FULL_SIZE``.
        device: ``meta`` counts (within ``weightless.Counting``), anything else runs: ``RUNNABLE`` types only.
        cameras: how many, mostly of 480 x 640 pixels (``diffusion``: one of 96 x 96, as on pusht).
    """
    if device != "meta" and policy_type not in RUNNABLE:
        raise ValueError(f"{policy_type} at published size can be counted, not run")
    with tempfile.TemporaryDirectory() as folder:
        return FULL_SIZE[policy_type](device, cameras, Path(folder))


def make_config(policy_type: str, features: dict[str, Any], device: str = "cpu", **fields: Any) -> Any:
    """LeRobot's config of a policy type with its default sizes, but for ``fields``."""
    from lerobot.policies.factory import make_policy_config

    config = make_policy_config(policy_type, **features, device="cpu", push_to_hub=False, **fields)
    config.device = device  # LeRobot would not take "meta" before
    return config


def assemble(config: Any, device: str, **batch: int) -> Built:
    """The adapter, wholly on ``device``, and the ``inputs`` there."""
    cls: Any = adapter_class(config.type)
    torch.manual_seed(0)
    with torch.device(device):
        policy = cls.build(config).eval().requires_grad_(False)
        return cls(policy, None, None), inputs(config, **batch)


def assemble_weightless(
    config: Any,
    change: Callable[[Any], None] | None = None,
    batch: dict[str, Tensor] | None = None,
    words: int = 0,
) -> Built:
    """The adapter without its large weights, for counting alone.

    Args:
        config: the policy's, as ``make_config`` gives it.
        change: what to do with the preprocessor first.
        batch: a preprocessed observation; default: one that went through the policy's own preprocessor.
        words: size of the vocabulary, where LeRobot cuts it to that of the (tiny) tokenizer.
    """
    from lerobot.policies.factory import make_pre_post_processors

    cls: Any = adapter_class(config.type)
    cls.prepare_config(config, PolicyConfig(device="cpu"))
    with quietly(), WithoutMemory():
        policy = cls.build(config).eval().requires_grad_(False)
        if words:
            policy.model.resize_token_embeddings(words, mean_resizing=False)
    to_fake(policy)
    if batch is not None:
        return cls(policy, None, None), batch
    preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=statistics(config))
    if change:
        change(preprocessor)
    adapter = cls(policy, preprocessor, postprocessor)
    return adapter, adapter.preprocess(adapter.example_observation(1, torch.Generator().manual_seed(0)))


def inputs(config: Any, tokens: int = 0, history: int = 0) -> dict[str, Tensor]:
    """A batch of one: every input feature, and language tokens."""
    lead = (1, history) if history else (1,)
    batch = {key: torch.rand(*lead, *feature.shape) for key, feature in config.input_features.items()}
    if tokens:
        batch["observation.language.tokens"] = torch.ones(*lead, tokens, dtype=torch.long)
        batch["observation.language.attention_mask"] = torch.ones(*lead, tokens, dtype=torch.bool)
    return batch


def features(cameras: int, actions: int = 14, state: int | None = None, pixels: Any = CAMERA) -> dict:
    """ALOHA's 14 joints, unless others are said."""
    return camera_features(cameras, pixels, state_dim=actions if state is None else state, action_dim=actions)


def act(device: str, cameras: int, folder: Path) -> Built:
    """LeRobot's default sizes."""
    return assemble(make_config("act", features(cameras), device, pretrained_backbone_weights=None), device)


def diffusion(device: str, cameras: int, folder: Path) -> Built:
    """LeRobot's default sizes, on pusht's one small camera, with ten steps of DDIM."""
    ten_steps = {"noise_scheduler_type": "DDIM", "num_inference_steps": 10}
    shapes = features(1, 2, pixels=(96, 96))
    config = make_config("diffusion", shapes, device, pretrained_backbone_weights=None, **ten_steps)
    return assemble(config, device, history=config.n_obs_steps)


def pi(policy_type: str) -> Callable[[str, int, Path], Built]:
    """pi0 or pi05; LeRobot's code holds their sizes."""

    def build(device: str, cameras: int, folder: Path) -> Built:
        config = make_config(policy_type, features(cameras), device)
        return assemble(config, device, tokens=config.tokenizer_max_length)

    return build


def smolvla(device: str, cameras: int, folder: Path) -> Built:
    """lerobot/smolvla_base; its vision tower looks at values, so it has some also where only counted."""
    vlm = str(folder)
    make_backbone(folder, {**NARROW["smolvlm"], **SIZES["smolvlm_500m"]})
    where = "cpu" if device == "meta" else device
    config = make_config("smolvla", features(cameras, 6), where, vlm_model_name=vlm, load_vlm_weights=False)
    if device == "meta":
        return assemble_weightless(config, batch=inputs(config, config.tokenizer_max_length))
    return assemble(config, device, tokens=config.tokenizer_max_length)


def evo1(device: str, cameras: int, folder: Path) -> Built:
    """LeRobot's default head on the first 14 layers of InternVL3-1B; images of 448 pixels."""
    backbones.make_internvl(folder, SIZES["internvl3_1b"])
    return assemble_weightless(make_config("evo1", features(cameras), vlm_model_name=str(folder)))


def molmoact2(device: str, cameras: int, folder: Path) -> Built:
    """LeRobot's default chunk."""
    backbones.make_molmo(folder / "backbone", SIZES["molmoact2"])
    word_tokenizer(folder / "fast")
    config = make_config(
        "molmoact2",
        features(cameras),
        checkpoint_path=str(folder / "backbone"),
        discrete_action_tokenizer=str(folder / "fast"),
        inference_action_mode="continuous",
        num_state_tokens=backbones.STATE_LEVELS,
        max_sequence_length=4096,
    )
    return assemble_weightless(config)


def multi_task_dit(device: str, cameras: int, folder: Path) -> Built:
    """LeRobot's default sizes on CLIP ViT-B/16; the default objective, so DDIM."""
    clip = str(folder / "clip")  # LeRobot insists on "clip" in the path
    make_backbone(Path(clip), {**NARROW["clip"], **SIZES["clip_b16"]})
    names = {"vision_encoder_name": clip, "text_encoder_name": clip}
    return assemble_weightless(make_config("multi_task_dit", features(cameras), **names))


def xvla(device: str, cameras: int, folder: Path) -> Built:
    """LeRobot's default transformer on Florence-2-large; images of 224 pixels, as in its checkpoints."""
    config = make_config(
        "xvla",
        features(cameras, 20),
        florence_config=make_florence(folder, SIZES["florence_2_large"]),
        tokenizer_name=str(folder),
        resize_imgs_with_padding=(224, 224),
    )
    return assemble_weightless(config)


def eo1(device: str, cameras: int, folder: Path) -> Built:
    """LeRobot's default head on Qwen2.5-VL-3B, as the config's ``vlm_base`` says."""
    model, base = backbones.make_qwen2_5(folder, SIZES["qwen2_5_vl_3b"]), str(folder)
    config = make_config("eo1", features(cameras), pretrained_path=base, vlm_base=base, vlm_config=model)
    return assemble_weightless(config)


def wall_x(device: str, cameras: int, folder: Path) -> Built:
    """x-square-robot/wall-oss-flow, with LeRobot's default head.

    Its second expert, for action tokens: workspace/models_config/qwen2_5_moe_flash.json in
    X-Square-Robot/wall-x; the first has the sizes of Qwen2.5-VL-3B.
    """
    qwen = SIZES["qwen2_5_vl_3b"]
    experts = [
        {"hidden_size": 2048, "intermediate_size": size, "hidden_act": "silu"} for size in (11008, 2048)
    ]
    config = make_config("wall_x", features(cameras), pretrained_name_or_path=str(folder))
    sizes = {**qwen, "text": {**qwen["text"], "experts": experts}}
    backbones.make_wall_x(folder, "left", config.max_action_dim, config.max_state_dim, sizes)
    return assemble_weightless(config, words=qwen["text"]["vocab_size"])


def groot(device: str, cameras: int, folder: Path) -> Built:
    """GR00T N1.7 with the sizes that LeRobot gives as its defaults, on Cosmos-Reason2-2B."""
    from lerobot.policies.groot.groot_n1_7 import GR00TN17Config

    base, qwen = folder / "gr00t", folder / "Qwen" / "Qwen3-VL-2B"
    make_backbone(qwen, {**NARROW["qwen3"], **SIZES["qwen3_vl_2b"]})
    GR00TN17Config(model_name=str(qwen)).save_pretrained(base)

    def local(preprocessor: Any) -> None:
        for step in preprocessor.steps:
            if hasattr(step, "image_target_size"):
                step.model_name = str(qwen)  # else NVIDIA's on the Hub

    return assemble_weightless(make_config("groot", features(cameras), base_model_path=str(base)), local)


def vla_jepa(device: str, cameras: int, folder: Path) -> Built:
    """LeRobot's default sizes on LIBERO's 7 actions; it does not shrink the images."""
    make_backbone(folder, {**NARROW["qwen3"], **SIZES["qwen3_vl_2b"]})
    config = make_config("vla_jepa", features(cameras, 7, 8), qwen_model_name=str(folder))
    return assemble_weightless(config)


def fastwam(device: str, cameras: int, folder: Path) -> Built:
    """LeRobot's default sizes on Wan 2.2, with LIBERO's cameras of 224 pixels, which it puts side by side."""
    from diffusers.utils import logging
    from safetensors.torch import save_file

    logging.set_verbosity_error()  # it would name each weight that the empty file lacks
    with WithoutMemory():
        vae, text_encoder = backbones.make_wan(folder, SIZES["wan_2_2"])
    vae.save_config(folder / "vae")
    text_encoder.config.save_pretrained(folder / "text_encoder")
    for file in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        # Without weights: transformers then initialises them all.
        save_file({}, folder / f"{file}.safetensors", metadata={"format": "pt"})
    config = make_config(
        "fastwam",
        features(cameras, 7, 8, pixels=224),
        text_encoder_model_id=str(folder),
        tokenizer_model_id=str(folder / "tokenizer"),
        image_size=(224, 224 * cameras),
    )
    return assemble_weightless(config)


FULL_SIZE: dict[str, Callable[[str, int, Path], Built]] = {
    "act": act,
    "diffusion": diffusion,
    "eo1": eo1,
    "evo1": evo1,
    "fastwam": fastwam,
    "groot": groot,
    "molmoact2": molmoact2,
    "multi_task_dit": multi_task_dit,
    "pi0": pi("pi0"),
    "pi05": pi("pi05"),
    "smolvla": smolvla,
    "vla_jepa": vla_jepa,
    "wall_x": wall_x,
    "xvla": xvla,
}
