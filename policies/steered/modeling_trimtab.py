"""LeRobot policy of type ``trimtab``: a noise actor that steers a frozen base, which it only refers to."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import OBS_STR
from torch import Tensor

from trimtab.adapters import Conditioning, PolicyConfig, UserError
from trimtab.adapters.checkpoint.files import POSTPROCESSOR, PREPROCESSOR
from trimtab.adapters.checkpoint.folder import resolve_folder
from trimtab.policies.acting import ChunkPolicy, denoise_several
from trimtab.policies.artefact import (
    Steered,
    is_artefact,
    load_artefact,
    moved,
    read_config,
    write_files,
)
from trimtab.policies.noise_samplers import NoiseSampler, own_noise, steered_noise
from trimtab.policies.steered.configuration_trimtab import TYPE, TrimtabConfig
from trimtab.policies.steered.processor_trimtab import RAW_TASK

TASK = "task"
# Policies whose `predict_action_chunk` takes noise beside the arguments of real-time chunking.
REAL_TIME = ("pi0", "pi05", "smolvla")


class TrimtabPolicy(PreTrainedPolicy):
    """Steers its base as it was steered in training.

    Batches are what the base's own processors make, actions are normalised as the base's are: LeRobot's
    commands run the processors around the policy. The base is no part of ``state_dict`` or ``parameters``.
    ``steered`` are the loaded parts, by default from ``config.pretrained_path``.
    """

    config_class = TrimtabConfig
    name = TYPE
    STEPS = (
        "its actions are relative to the state that a chunk was made for, and LeRobot's loop over steps adds "
        "the state of each step"
    )

    def __init__(
        self, config: TrimtabConfig, *args: Any, steered: Steered | None = None, **kwargs: Any
    ) -> None:
        super().__init__(config)
        if steered is None:
            if config.pretrained_path is None:
                raise UserError(
                    "--policy.path", "a trimtab policy is made by `trimtab adapt`; name one that it made"
                )
            steered = _load(Path(config.pretrained_path), config)
        _check_features(config, steered)
        self.steered = steered
        self.adapter = steered.adapter
        self.actor = steered.actor.requires_grad_(False)
        if config.compile_model:
            self.actor.compile()
        self.to(config.device)
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: TrimtabConfig | None = None,
        revision: str | None = None,
        token: str | None = None,
        **kwargs: Any,
    ) -> TrimtabPolicy:
        """Load an artefact from a folder or the Hub, and the base that it refers to."""
        folder = resolve_folder(str(pretrained_name_or_path), revision, token)
        if not is_artefact(str(folder)):
            raise UserError("--policy.path", f"{folder} is not a policy of type {TYPE}")
        config = config or read_config(folder)
        return cls(config, steered=_load(folder, config)).eval()

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        here = replace(self.steered, config=self.config)
        write_files(moved(here, save_directory.resolve()), save_directory)

    @property
    def base(self) -> Any:
        """The frozen LeRobot policy; ``None`` where it is on a server."""
        return self.adapter.policy

    def reset(self) -> None:
        """Forget the episode. Call whenever the environments are reset."""
        self._observations: deque[dict[str, Any]] = deque(maxlen=self.adapter.n_obs_steps)
        self._actions: deque[Tensor] = deque()
        self._before: tuple[Conditioning, Tensor] | None = None
        if self.base is not None:
            self.base.reset()

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The next action of each environment, (B, action_dim); a chunk is made where none is left.

        Args:
            batch: one observation of each environment. The history that the base looks at is kept here,
                the first observation standing in for those before it.
            noise: the draws of a chunk, (B, draws, *noise_shape) for as many as ``num_candidates``, or
                (B, *noise_shape) for one; the actor starts from the last. Default: fresh.
            kwargs: for the plain base.
        """
        if self._plain:
            return self.base.select_action(batch, **kwargs, **_given(noise))
        if not self.steps_apart:
            raise UserError(
                "--policy.path", f"{self.STEPS}; use trimtab eval, --inference.type=rtc or the policy server"
            )
        self._observations.extend([batch] * (1 if self._observations else self.adapter.n_obs_steps))
        if not self._actions:
            self._actions.extend(self._chunk(self._history(list(self._observations)), noise).unbind(1))
        return self._actions.popleft()

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict[str, Any], noise: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The steered chunk (B, n_action_steps, action_dim) for an observation.

        Args:
            batch: as for ``select_action``; or with a time axis, (B, n_obs_steps, ...), where the base has
                one. Without it the history is what ``select_action`` has seen, or this observation alone.
            noise: as for ``select_action``.
            kwargs: of real-time chunking. With them the base itself makes the chunk, whole
                (B, chunk_size, action_dim), from the noise that the actor chose.
        """
        if self._plain:
            return self.base.predict_action_chunk(batch, **kwargs, **_given(noise))
        rtc = getattr(self.config, "rtc_config", None)
        if any(value is not None for value in kwargs.values()) or (rtc is not None and rtc.enabled):
            return self._real_time_chunk(batch, noise, kwargs)
        if self._has_time(batch):
            return self._chunk(batch, noise)
        seen = list(self._observations) or [batch] * self.adapter.n_obs_steps
        return self._chunk(self._history(seen), noise)

    @property
    def steps_apart(self) -> bool:
        """Whether a chunk's actions can be postprocessed at the steps that they are executed at."""
        return self.adapter.chunk_shape[0] == 1 or not self.adapter.relative_actions

    def supports_rtc(self) -> bool:
        """Whether the base does real-time chunking, takes noise while it does, and its chunk is executed."""
        if self.base is None or not self.base.supports_rtc():
            return False
        return self._plain or (self.adapter.policy_type in REAL_TIME and not self._edits)

    def init_rtc_processor(self) -> None:
        """Hand ``config.rtc_config``, which LeRobot's engine sets, to the base."""
        if not self._plain and self.config.num_candidates > 1:
            logging.warning(
                "real-time chunking executes the actor's own chunk: --policy.num_candidates=%d has no effect",
                self.config.num_candidates,
            )
        self.base.config.rtc_config = getattr(self.config, "rtc_config", None)
        self.base.init_rtc_processor()

    def get_optim_params(self) -> Any:
        return self.config.get_optimizer_preset()

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict | None]:
        return self.config.get_optimizer_preset()

    # The steered path.

    @property
    def _plain(self) -> bool:
        return not self.config.use_actor and self.base is not None

    @property
    def _edits(self) -> bool:
        return self.config.use_edit and self.steered.edit is not None

    def _history(self, seen: list[dict[str, Any]]) -> dict[str, Any]:
        """What the adapter encodes: with the time axis that the base has."""
        last = seen[-1]
        if not self.adapter.history:
            return last
        tasks = {key: last[key] for key in (TASK, RAW_TASK) if key in last}
        return tasks | {
            key: torch.stack([one[key] for one in seen], 1)
            for key, value in last.items()
            if key.startswith(OBS_STR) and isinstance(value, Tensor) and value.ndim
        }

    def _has_time(self, batch: dict[str, Any]) -> bool:
        if not self.adapter.history:
            return True
        features = self.adapter.config.input_features
        return any(k in batch and batch[k].ndim == len(f.shape) + 2 for k, f in features.items())

    def _encode(self, batch: dict[str, Any]) -> Conditioning:
        try:
            if self.base is None:  # a server normalises; it takes raw observations with a time axis
                raw = {k: v.unsqueeze(1) for k, v in batch.items() if k in self.config.input_features}
                return self.adapter.observe(raw | ({TASK: list(batch[TASK])} if TASK in batch else {}))
            before = self._before
            tasks = batch.get(RAW_TASK, batch[TASK]) if TASK in batch else None
            batch = {key: value for key, value in batch.items() if key != RAW_TASK}
            encoded = self.adapter.encode(batch) if before is None else self.adapter.follow(*before, batch)
            return self.adapter.watch(encoded, batch, tasks)
        except KeyError as error:
            given = ", ".join(sorted(key for key in batch if key.startswith(OBS_STR))) or "none"
            raise UserError(
                "--env.type", f"the base policy needs {error.args[0]}, the observations are {given}"
            ) from None

    def _prior(self, count: int, draws: int, noise: Tensor | None) -> Tensor:
        """(count, draws, *noise_shape): ``noise``, or fresh where ``None``, or where it is one of several."""
        device, one = self.actor.normalizer.mean.device, (count, *self.config.noise_shape)
        expected = (count, draws, *self.config.noise_shape)
        if noise is None:
            return torch.randn(expected, device=device)
        if tuple(noise.shape) == one:
            fresh = torch.randn((count, draws - 1, *one[1:]), device=noise.device)
            noise = torch.cat([fresh, noise.float().unsqueeze(1)], 1)
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the policy takes {expected} or {one}")
        return noise.to(device, torch.float32)

    def _seen(self, conditioning: Conditioning) -> Tensor:
        """What the actor looks at; nothing, where it takes one noise for all and nothing else looks."""
        if not (self.actor.space.uses_features or self._edits or self.config.num_candidates > 1):
            return torch.zeros(conditioning.batch_size, 0)
        return self.adapter.seen(conditioning).float()

    def _sampler(self) -> NoiseSampler:
        """Who chooses a single noise; a server's own draw where no actor is used, which is out of reach."""
        if not self.config.use_actor:
            return own_noise(self.adapter.noise_spec)
        return steered_noise(self.actor, self.config.deterministic)

    def _chunk(self, batch: dict[str, Any], noise: Tensor | None) -> Tensor:
        conditioning = self._encode(batch)
        count = conditioning.batch_size
        policy: ChunkPolicy = self._sampler()
        config = self.config
        if config.use_actor:
            policy = self.steered.policy(config.deterministic, config.num_candidates, config.use_edit)
        prior = self._prior(count, policy.draws, noise)
        chunk = policy.act(
            self._seen(conditioning).to(prior), prior, partial(denoise_several, self.adapter, conditioning)
        ).chunk
        if self.adapter.remembers:
            self._before = (conditioning, chunk)
        return self.adapter.postprocess(chunk, conditioning) if self.base is None else chunk

    def _real_time_chunk(self, batch: dict[str, Any], noise: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        if not self.supports_rtc():
            who = "policy that edits its chunks" if self._edits else f"{self.adapter.policy_type} policy"
            mend = "use sync" + ", or --policy.use_edit=false" * self._edits
            raise UserError("--inference.type", f"a steered {who} does no real-time chunking; {mend}")
        conditioning = self._encode(batch)
        prior = self._prior(conditioning.batch_size, 1, noise)[:, 0]
        chosen = self._sampler()(self._seen(conditioning).to(prior), prior)
        chosen = chosen.to(self.adapter.device, self.adapter.noise_spec.dtype)
        return self.base.predict_action_chunk(batch, noise=chosen, **kwargs)


def _given(noise: Tensor | None) -> dict[str, Tensor]:
    return {} if noise is None else {"noise": noise}


def _load(folder: Path, config: TrimtabConfig) -> Steered:
    missing = [name for name in (PREPROCESSOR, POSTPROCESSOR) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            "--policy.path",
            f"{folder} lacks {', '.join(missing)}, which LeRobot's commands need; write it anew with "
            f"`trimtab export --run={folder} --output_dir=...`",
        )
    return load_artefact(PolicyConfig(path=str(folder), device=config.device), config)


def _check_features(config: TrimtabConfig, steered: Steered) -> None:
    """Raise a UserError for features, executed steps or seen steps other than the base's."""
    adapter = steered.adapter
    names = adapter.raw_names()
    known = {names[k]: tuple(f.shape) for k, f in adapter.config.input_features.items()}
    given = {k: tuple(f.shape) for k, f in (config.input_features or {}).items()}
    if known != given:
        odd = sorted(k for k in known.keys() | given.keys() if known.get(k) != given.get(k))
        raise UserError(
            "--policy.input_features", f"the config says other inputs than its base takes: {', '.join(odd)}"
        )
    for name, loaded in (("n_action_steps", adapter.chunk_shape[0]), ("n_obs_steps", adapter.n_obs_steps)):
        if getattr(config, name) != loaded:
            raise UserError(
                f"--policy.{name}",
                f"the base was loaded with {loaded}, the config says {getattr(config, name)}; `trimtab "
                "export --policy.n_action_steps=` changes that of an artefact without critic and edits",
            )
    made = {k: tuple(f.shape) for k, f in adapter.config.output_features.items()}
    asked = {k: tuple(f.shape) for k, f in (config.output_features or {}).items()}
    if made != asked:
        raise UserError(
            "--env.type",
            f"the base policy makes {made}, the environment takes {asked}; choose the environment that it "
            "was trained on",
        )
