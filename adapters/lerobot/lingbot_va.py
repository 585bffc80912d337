"""Adapter of LeRobot's ``lingbot_va`` policy (a Wan 2.2 world model that first imagines video, then acts).

Noise: that of the ACTION stream, (frame_chunk_size * action_per_frame, action_dim), standard normal; channels
outside ``used_action_channel_ids`` are inert. The noise of the VIDEO stream is held fixed: the same draw
for every chunk, from a generator of its own. So the policy is a function of (observation, noise), and the
imagined video depends on the observation alone: ``encode`` imagines it once for any number of noises, and
``denoise`` integrates the action stream over the kept keys and values.

The policy has a memory: after a chunk it takes in what was seen and done meanwhile. ``encode`` starts an
episode (LeRobot's state after ``reset()``); ``follow`` gives the conditioning of the next chunk. All memory
lies in the conditioning, so every method is a pure function. ``rl.runner`` follows within an episode;
whoever calls ``encode`` for every chunk runs the policy without its memory. The first chunk of an episode
has one frame's actions fewer than later ones, for its first frame is the observation itself; ``chunk_shape``
is that of the first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from trimtab.adapters import Conditioning, NoiseSpec, PolicyAdapter, PolicyConfig
from trimtab.adapters.lerobot.fastwam import check_wan_folder, loading_wan, wan_part_folder
from trimtab.adapters.lerobot.injection import injected

VIDEO_SEED = 0
CACHE = "pos"  # LeRobot's name of its one cache


class LingBotVAAdapter(PolicyAdapter):
    """Features: mean of the imagined video's last hidden states, and the state where the policy has one."""

    policy_type: ClassVar[str] = "lingbot_va"
    takes_tokenizer = False  # it lies beside the backbone
    backbone_fields = ("wan_pretrained_path",)
    steps_field = "action_num_inference_steps"
    reads_task = True
    history: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    max_batch: ClassVar[int | None] = 1
    resizes_images = True

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        super().__init__(policy, preprocessor, postprocessor)
        config = policy.config
        used = config.used_action_channel_ids
        live = torch.zeros((config.chunk_size, config.action_dim), dtype=torch.bool)
        live[:, used] = True
        self.noise_spec = NoiseSpec((config.chunk_size, config.action_dim), live=live)
        self.chunk_shape = (config.chunk_size - config.action_per_frame, len(used))
        self.n_obs_steps = config.chunk_size  # what ``follow`` needs of the chunk before
        self.video_noise = torch.randn(
            (1, config.in_channels, config.frame_chunk_size, *policy._latent_hw),
            generator=torch.Generator().manual_seed(VIDEO_SEED),
        )
        self._prompts: dict[str, tuple[Tensor, Tensor | None]] = {}

    @classmethod
    def prepare_config(cls, config: Any, options: PolicyConfig) -> list[str]:
        if options.backbone:
            check_wan_folder(options.backbone)
        notes = ["lingbot_va: the noise of the imagined video is held fixed, that of the actions is steered"]
        if config.attn_mode != "torch":
            notes.append(f"attn_mode '{config.attn_mode}' is for training: switched to 'torch'")
            config.attn_mode = "torch"
        return notes

    @classmethod
    def build(cls, config: Any) -> Any:
        policy = super().build(config)
        with loading_wan("the VAE, text encoder or tokenizer", config.wan_pretrained_path):
            policy._ensure_frozen_modules()  # now, for LeRobot would only miss them in the first episode
        return policy

    @classmethod
    def frozen_parts(cls, policy: Any) -> dict[str, tuple[torch.nn.Module, Path]]:
        source, loaded = policy.config.wan_pretrained_path, policy._frozen
        vae, text_encoder = wan_part_folder(source, "vae"), wan_part_folder(source, "text_encoder")
        parts = {"vae": (loaded["vae"], vae), "text_encoder": (loaded["text_encoder"], text_encoder)}
        if "streaming_vae_half" in loaded:  # a second copy, for the wrist cameras
            parts["vae_half"] = (loaded["streaming_vae_half"].vae, vae)
        return parts

    def preprocess(self, observation: dict[str, Any]) -> dict[str, Any]:
        return {**super().preprocess(observation), "task": list(observation["task"])}

    def encode(self, batch: dict[str, Any]) -> Conditioning:
        """Start an episode: look at the last observation of each history, imagine the video."""
        policy, rows = self.policy, []
        for row, task in enumerate(batch["task"]):
            policy.reset()
            if task not in self._prompts:  # the text encoder is large and often on the CPU
                self._prompts[task] = policy._encode_prompt(task)
            policy._prompt_embeds, policy._negative_prompt_embeds = self._prompts[task]
            policy._init_latent = policy._encode_frames(self._frames(batch, row, [-1]))
            policy._init_streaming_cache(policy._init_latent)
            rows.append(self._imagine(batch, row))
        return _joined(rows)

    def follow(self, conditioning: Conditioning, chunk: Tensor, batch: dict[str, Any]) -> Conditioning:
        """As the base class; the last observations of ``batch`` are those after each action of ``chunk``."""
        config, rows = self.config, []
        steps, per_frame = chunk.shape[1], config.action_per_frame
        if batch[config.obs_cam_keys[0]].shape[1] < steps:
            raise ValueError(f"lingbot_va needs the {steps} observations since its last chunk")
        seen = [s - steps for s in range(steps) if (s % per_frame + 1) % self.policy._keyframe_stride == 0]
        for row in range(len(chunk)):
            self._restore(conditioning, row)
            done = chunk.new_zeros(1, config.action_dim, config.frame_chunk_size, config.action_per_frame, 1)
            executed = chunk[row].T.unflatten(1, (-1, per_frame)).unsqueeze(-1)
            done[0, config.used_action_channel_ids, -executed.shape[1] :] = executed
            self.policy._compute_kv_cache(self._frames(batch, row, seen), done)
            rows.append(self._imagine(batch, row))
        return _joined(rows)

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        policy, chunks = self.policy, []
        for row, drawn in enumerate(self.native_noise(noise).split(1)):
            self._restore(conditioning, row)
            only_actions = _changed(self.config, video_exec_step=0)
            with injected(self, [self.video_noise, drawn]), only_actions:
                actions, _ = policy._infer(None, policy._frame_st_id)
            actions = actions[:, self.config.used_action_channel_ids].squeeze(-1)
            if policy._frame_st_id == 0:
                actions = actions[:, :, 1:]  # the observation's own frame
            chunks.append(actions.flatten(2).transpose(1, 2).float())
        return torch.cat(chunks)

    def native_noise(self, noise: Tensor) -> Tensor:
        """(B, action_dim, frame_chunk_size, action_per_frame, 1)"""
        return noise.transpose(1, 2).unflatten(2, (-1, self.config.action_per_frame)).unsqueeze(-1)

    def _frames(self, batch: dict[str, Any], row: int, times: list[int]) -> list[dict[str, Tensor]]:
        return [{key: batch[key][row : row + 1, t] for key in self.config.obs_cam_keys} for t in times]

    def _imagine(self, batch: dict[str, Any], row: int) -> Conditioning:
        """Run the video stream from the policy's present state, and keep that state."""
        policy, first = self.policy, self.policy._frame_st_id == 0
        seen: dict[str, Tensor] = {}
        hook = policy.transformer.proj_out.register_forward_pre_hook(
            lambda _, inputs: seen.update(hidden=inputs[0])
        )
        nothing = self.video_noise.new_zeros((1, *self.noise_spec.shape))
        # Without steps of its own, LeRobot still lets the action stream fill its place in the cache, which
        # may push out old entries, as it should; what it wrote is taken back.
        no_actions = _changed(self.config, action_num_inference_steps=0)
        with hook, no_actions, injected(self, [self.video_noise, self.native_noise(nothing)]):
            policy._infer(policy._init_latent if first else None, policy._frame_st_id)
        for block in policy.transformer.blocks:
            cache = block.attn1.attn_caches[CACHE]
            newest = cache["id"][cache["mask"]].max()
            block.attn1.restore_cache(CACHE, cache["mask"] & (cache["id"] == newest))
        features = [seen["hidden"][0].float().mean(0)]  # row 0: with the prompt
        if OBS_STATE in self.config.input_features:
            features.append(batch[OBS_STATE][row, -1].float())
        return self._state(torch.cat(features))

    def _state(self, features: Tensor) -> Conditioning:
        """The policy's memory; of the cache only what is in use."""
        policy = self.policy
        tensors = {
            "features": features,
            "frame": torch.tensor(policy._frame_st_id),
            "first": policy._init_latent[0],
            "prompt": policy._prompt_embeds[0],
        }
        if policy._negative_prompt_embeds is not None:
            tensors["negative"] = policy._negative_prompt_embeds[0]
        caches = [block.attn1.attn_caches[CACHE] for block in policy.transformer.blocks]
        slots = [cache["mask"].nonzero().squeeze(-1) for cache in caches]
        tensors["slots"] = torch.stack(slots)
        for name in ("id", "is_pred"):
            tensors[name] = torch.stack([cache[name][used] for cache, used in zip(caches, slots)])
        for name in ("k", "v"):
            tensors[name] = torch.stack([cache[name][:, used] for cache, used in zip(caches, slots)])
        for vae, entries in self._video_encoders():
            for index, value in enumerate(entries.feat_cache):
                if value is not None:
                    tensors[f"{vae}.{index}"] = value
        return Conditioning({name: value.unsqueeze(0) for name, value in tensors.items()})

    def _restore(self, conditioning: Conditioning, row: int) -> None:
        """Give the policy the memory of a row, as copies where LeRobot writes in place."""
        policy = self.policy
        state = {name: value[row // conditioning.repeats] for name, value in conditioning.tensors.items()}
        policy._frame_st_id = int(state["frame"])
        policy._init_latent = state["first"].unsqueeze(0)
        policy._prompt_embeds = state["prompt"].unsqueeze(0)
        policy._negative_prompt_embeds = state["negative"].unsqueeze(0) if "negative" in state else None
        blocks = policy.transformer.blocks
        if blocks[0].attn1.attn_caches.get(CACHE) is None:
            policy._init_streaming_cache(policy._init_latent)
        for layer, block in enumerate(blocks):
            cache, used = block.attn1.attn_caches[CACHE], state["slots"][layer]
            cache["mask"].zero_()
            cache["mask"][used] = True
            for name in ("id", "is_pred"):
                cache[name][used] = state[name][layer]
            for name in ("k", "v"):
                cache[name][:, used] = state[name][layer]
        for vae, encoder in self._video_encoders():
            encoder.feat_cache = [state.get(f"{vae}.{i}") for i in range(encoder.enc_conv_num)]

    def _video_encoders(self) -> list[tuple[str, Any]]:
        frozen = self.policy._frozen
        return [(name, frozen[name]) for name in ("streaming_vae", "streaming_vae_half") if name in frozen]


def _joined(rows: list[Conditioning]) -> Conditioning:
    """One conditioning of many, which must stand at the same chunk of their episodes."""
    if len(rows) == 1:
        return rows[0]
    return Conditioning({name: torch.cat([row.tensors[name] for row in rows]) for name in rows[0].tensors})


@contextmanager
def _changed(config: Any, **fields: Any) -> Iterator[None]:
    """``config`` with other fields for a while."""
    before = {name: getattr(config, name) for name in fields}
    vars(config).update(fields)
    try:
        yield
    finally:
        vars(config).update(before)
