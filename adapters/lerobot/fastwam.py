"""Adapter of LeRobot's ``fastwam`` policy (Wan 2.2's video expert with an action expert, flow matching).

Noise: (action_horizon, action_dim), standard normal. LeRobot itself draws it anew from ``inference_seed``
(42) for every call and every row, so its own policy meets one and the same noise for ever.

``encode`` runs the VAE, the text encoder and the video expert over the current frame once; ``denoise``
integrates the action expert over the kept keys and values, all noises in one batch, where LeRobot goes
sample by sample.

A checkpoint does not hold the frozen VAE and text encoder. LeRobot takes both from the Hub, the VAE by a
name in its code; ``--policy.backbone`` names a folder with ``vae``, ``text_encoder`` and ``tokenizer``.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar

import torch
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE
from torch import Tensor

from trimtab.adapters import Conditioning, PolicyConfig, UserError, policy_error
from trimtab.adapters.checkpoint.files import BACKBONE, CONFIG, part_weights
from trimtab.adapters.errors import reason
from trimtab.adapters.lerobot.vla import VLAAdapter, restore_prefix, store_layers

OLD_BLOCK = re.compile(r"mixtures\.([^.]+)\.blocks\.(\d+)\.")
WAN_HINT = (
    "The checkpoint holds neither Wan's VAE nor its text encoder: name a folder with 'vae', 'text_encoder' "
    "and 'tokenizer' (a copy of Wan-AI/Wan2.2-TI2V-5B-Diffusers)"
)


def check_wan_folder(folder: str) -> None:
    """Refuse a ``--policy.backbone`` that lacks one of Wan's frozen parts, or its safetensors files."""
    for part in ("vae", "text_encoder", "tokenizer"):
        if not (Path(folder) / part).is_dir():
            raise UserError(BACKBONE, f"{folder} has no folder '{part}'. {WAN_HINT}")
        if part != "tokenizer":
            part_weights(Path(folder) / part, BACKBONE)  # else the libraries would unpickle others


@contextmanager
def loading_wan(part: str, source: str) -> Iterator[None]:
    """Say in one line which of Wan's frozen parts does not load, whatever the libraries raise."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Tensors that diffusers does not find stay without values, which PyTorch refuses to move.
        why = "tensors of the VAE are missing" if "meta tensor" in str(error) else reason(error)
        raise UserError(BACKBONE, f"{part} of {source} cannot be loaded: {why}. {WAN_HINT}") from error


def wan_part_folder(source: str, part: str) -> Path:
    """Where the files of one of Wan's frozen parts lie that has been loaded from a folder or the Hub."""
    from huggingface_hub import hf_hub_download

    folder = Path(source) / part
    if folder.is_dir():
        return folder
    return Path(hf_hub_download(source, f"{part}/{CONFIG}", local_files_only=True)).parent


class FastWAMAdapter(VLAAdapter):
    """Features: mean of the video expert's last hidden states over the frame, and the normalised state."""

    policy_type: ClassVar[str] = "fastwam"
    backbone_fields = ("text_encoder_model_id",)
    steps_field = "num_inference_steps"
    dtype_field = "torch_dtype"
    noise_fields = ("action_horizon", "action_dim")

    @classmethod
    def prepare_config(cls, config: Any, options: PolicyConfig) -> list[str]:
        if options.backbone:
            check_wan_folder(options.backbone)
            config.tokenizer_model_id = str(Path(options.backbone) / "tokenizer")
        config.tokenizer_model_id = options.tokenizer or config.tokenizer_model_id
        mode = config.video_dit_config.get("video_attention_mask_mode")
        if mode != "first_frame_causal":
            raise policy_error(
                f"its video_attention_mask_mode is '{mode}', with which it cannot infer actions"
            )
        if not config.load_text_encoder:
            raise policy_error("it was saved without its text encoder (load_text_encoder=false)")
        notes = []
        if config.inference_seed is not None:
            notes.append(
                f"LeRobot draws this policy's noise from inference_seed {config.inference_seed} anew for "
                "each chunk; here the base draws another one"
            )
        if config.torch_dtype != "float32" and not str(config.device).startswith("cuda"):
            # It relies on CUDA's autocast for its time embedding.
            if options.dtype:
                raise UserError("--policy.dtype", f"fastwam runs in {options.dtype} on CUDA alone")
            note = f"fastwam runs in {config.torch_dtype} on CUDA alone: switched to float32"
            config.torch_dtype = "float32"
            notes.append(note)
        return notes

    @classmethod
    def build(cls, config: Any) -> Any:
        """The policy; the VAE from the text encoder's folder if that is one, else from the Hub."""
        from lerobot.policies.fastwam import modeling_fastwam as lerobot

        vae_source = cls._vae_source(config)

        def load_vae(torch_dtype: torch.dtype, device: str) -> Any:
            from diffusers import AutoencoderKLWan
            from lerobot.policies.fastwam.wan.adapters import WanVideoVAE38

            vae = AutoencoderKLWan.from_pretrained(vae_source, subfolder="vae", torch_dtype=torch_dtype)
            return WanVideoVAE38(dtype=torch_dtype, device=device, pretrained=vae)

        names = dict(vars(lerobot))
        for name, part, folder, load in (
            ("load_pretrained_wan_vae", "the VAE", vae_source, load_vae),
            ("load_pretrained_wan_text_encoder", "the text encoder", config.text_encoder_model_id, None),
            ("build_wan_tokenizer", "the tokenizer", config.tokenizer_model_id, None),
        ):
            names[name] = loading_wan(part, folder)(load or names[name])

        class LocalFastWAM(lerobot.FastWAMPolicy):
            """LeRobot's own builder, which knows no path of the VAE, with these loaders bound anew."""

            _build_core_model = FunctionType(lerobot.FastWAMPolicy._build_core_model.__code__, names)

        return LocalFastWAM(config)

    @classmethod
    def frozen_parts(cls, policy: Any) -> dict[str, tuple[torch.nn.Module, Path]]:
        model, config = policy.model, policy.config
        vae = wan_part_folder(cls._vae_source(config), "vae")
        text_encoder = wan_part_folder(config.text_encoder_model_id, "text_encoder")
        return {"vae": (model.vae.vae, vae), "text_encoder": (model.text_encoder.model, text_encoder)}

    @staticmethod
    def _vae_source(config: Any) -> str:
        from lerobot.policies.fastwam.wan.components import WAN22_DIFFUSERS_MODEL_ID

        source = config.text_encoder_model_id
        return source if (Path(source) / "vae").is_dir() else WAN22_DIFFUSERS_MODEL_ID

    @classmethod
    def prepare_weights(cls, saved: dict[str, Tensor], policy: Any) -> dict[str, Tensor]:
        return {OLD_BLOCK.sub(r"layers.\2.blocks.\1.", name): value for name, value in saved.items()}

    @classmethod
    def processor_overrides(cls, config: Any, options: PolicyConfig) -> dict[str, dict[str, Any]]:
        return {}  # the tokenizer belongs to the model

    def cameras_used(self, given: Collection[str]) -> set[str]:
        """All there are: LeRobot puts every camera of the batch side by side."""
        return {key for key in given if key.startswith(f"{OBS_IMAGES}.")}

    def encode(self, batch: dict[str, Any]) -> Conditioning:
        from lerobot.policies.fastwam.modeling_fastwam import _batch_to_infer_kwargs

        model, inputs = self.policy.model, _batch_to_infer_kwargs(batch, self.config)
        image = inputs["input_image"].to(model.device, model.torch_dtype)
        latents = model._encode_video_latents(image.unsqueeze(2), tiled=inputs["tiled"])
        state = batch.get(OBS_STATE)
        context, mask = model._prepare_infer_context(
            inputs["prompt"],
            inputs["context"],
            inputs["context_mask"],
            None if state is None else state.to(model.device, model.torch_dtype),
        )
        video = model.video_expert.pre_dit(
            x=latents,
            timestep=latents.new_zeros(len(latents)),
            context=context,
            context_mask=mask,
            fuse_vae_embedding_in_latents=model.video_expert.fuse_vae_embedding_in_latents,
        )
        hidden, tensors = video["tokens"], {"context": context, "context_mask": mask}
        attention = model.video_expert.build_video_to_video_mask(
            hidden.shape[1], video["meta"]["tokens_per_frame"], hidden.device
        )
        prefix = []
        for layer in model.mot.layers:
            hidden, keys, values = layer(
                mode="video_prefill",
                x=hidden,
                freqs=video["freqs"],
                t_mod=video["t_mod"],
                context_payload={"context": video["context"], "mask": video["context_mask"]},
                video_attention_mask=attention,
            )
            prefix.append((keys, values))
        features = [hidden.float().mean(1)] + ([] if state is None else [state.float()])
        return Conditioning({"features": torch.cat(features, -1), **tensors, **store_layers(prefix)})

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        model, cache = self.policy.model, _VideoCache(restore_prefix(conditioning).layers)
        context, mask = conditioning.rows("context"), conditioning.rows("context_mask")
        length = conditioning.tensors["keys.0"].shape[1]  # of one frame
        attention = model._build_mot_attention_mask(length, noise.shape[1], length, self.device)
        chunk = noise.to(model.device, model.torch_dtype)
        schedule = model.infer_action_scheduler.build_inference_schedule(
            self.config.num_inference_steps, model.device, chunk.dtype, self.config.sigma_shift
        )
        for time, step in zip(*schedule, strict=True):
            velocity = model._predict_action_noise_with_cache(
                chunk, time.unsqueeze(0), context, mask, cache, attention, length
            )
            chunk = model.infer_action_scheduler.step(velocity, step, chunk)
        return self.executed(chunk.float())


class _VideoCache(list):
    """The prefix as LeRobot's FastWAM wants it; of the rows for K noises only one layer's exist at a time."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(zip("kv", super().__getitem__(index), strict=True))
