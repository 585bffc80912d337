"""Fine-tuning of a LeRobot policy, by LoRA or in full, with LeRobot's own training step."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.default import DatasetConfig, PeftConfig
from lerobot.configs.train import TrainPipelineConfig

from trimtab.adapters import PolicyAdapter, PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.files import POSTPROCESSOR, PREPROCESSOR, state_files
from trimtab.adapters.checkpoint.identity import hash_files, settings_hashes
from trimtab.adapters.checkpoint.legacy import processor_files
from trimtab.adapters.errors import at_least, reason
from trimtab.recipes.finetune.data import batches, check_features
from trimtab.recipes.finetune.lora_targets import put_lora
from trimtab.recipes.support.launched import launched_processes
from trimtab.rl.data.opening import open_dataset
from trimtab.rl.runs.progress import Progress

LORA_RATE = 10.0  # LoRA learns best about ten times faster than full fine-tuning; LeRobot's docs do so too


@dataclass
class TuningConfig:
    """How the policy is fine-tuned."""

    # lora: a PEFT adapter, the policy itself stays as it is; full: all of the policy's trainable weights.
    method: str = "lora"
    # LoRA's own options, LeRobot's; target_modules: names, or a regular expression over all of a name.
    peft: PeftConfig = field(default_factory=PeftConfig)
    # Gradient steps (with --from_rollouts in each round); default: 20,000 on a dataset, 800 in a round.
    steps: int | None = None
    batch_size: int = 64
    # Peak learning rate; default: the policy's own (LeRobot's preset), for LoRA ten times that.
    learning_rate: float | None = None
    # Frames at an episode's end where no training window starts; default: the policy's own.
    drop_last_frames: int | None = None
    # Processes that read a dataset's cameras.
    num_workers: int = 4

    def check(self) -> None:
        """Refuse values that no run can have."""
        if self.method not in ("lora", "full"):
            raise UserError("--method", f"must be lora or full, got {self.method}")
        if self.peft.method_type.upper() != "LORA":
            raise UserError("--peft.method_type", f"only LORA is trained here, got {self.peft.method_type}")
        at_least(1, self.peft, "--peft.", "r", "lora_alpha")
        at_least(1, self, "--", "steps", "batch_size")
        at_least(0, self, "--", "drop_last_frames", "num_workers")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise UserError("--learning_rate", f"must be between 0 and 1, got {self.learning_rate}")


class FineTuner:
    """A policy in training, and the adapter through which it acts meanwhile.

    Args:
        adapter: the loaded base policy; its weights are trained in place (LoRA: layers are put in).
        folder: the base's folder; never written to.
        options: how the base was loaded.
        config: how to train.

    Attributes:
        adapter: acts with the weights as they are now.
        updates: gradient steps taken.

    Raises:
        UserError: no layer of the policy matches the LoRA targets; several processes were launched.
    """

    def __init__(
        self, adapter: PolicyAdapter, folder: Path, options: PolicyConfig, config: TuningConfig
    ) -> None:
        from accelerate import Accelerator

        if launched_processes() > 1:  # as the environment says, whether or not the others are there
            raise UserError(
                "accelerate",
                "trimtab lora runs in one process, and WORLD_SIZE says there are more; unset it, or for many "
                "GPUs take `lerobot-train --peft...`",
            )
        self.folder, self.options, self.config = folder.resolve(), options, config
        self.adapter, self.policy, self.updates = adapter, adapter.policy, 0
        self.base_files = adapter.weights_files
        self.base_hashes = self._hashes()
        self.model: Any = self.policy
        if config.method == "lora":
            self._add_lora()
        else:
            for name, parameter in self.policy.named_parameters():
                parameter.requires_grad_(name in adapter.trainable)
        precision = {"bfloat16": "bf16", "float16": "fp16"}.get(getattr(adapter.config, "dtype", None) or "")
        self.accelerator = Accelerator(
            cpu=adapter.device.type == "cpu",
            step_scheduler_with_optimizer=False,
            mixed_precision=precision or "no",
        )
        self.prepared = self.accelerator.prepare(self.model)

    def _add_lora(self) -> None:
        """Put LoRA layers into the policy, and act through them."""
        base = self.adapter
        self.policy.config.pretrained_path = self.folder
        self.model = put_lora(self.policy, base.policy_type, base.trainable, self.config.peft)
        if not Path(self.options.path or "").expanduser().exists():  # on the Hub: name it, not its cache
            saved = self.model.peft_config[self.model.active_adapter]
            saved.base_model_name_or_path, saved.revision = self.options.path, self.options.revision
        self.adapter = type(base)(self.policy, base.preprocessor, base.postprocessor)
        for name in ("notes", "weights_files", "trainable"):
            setattr(self.adapter, name, getattr(base, name))

    @property
    def trained_parameters(self) -> int:
        """Number of weights that training changes."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def pipeline(self, dataset: DatasetConfig, steps: int, seed: int) -> TrainPipelineConfig:
        """The same training as LeRobot's own config."""
        from lerobot.optim.schedulers import DiffuserSchedulerConfig

        config, lora = self.config, self.config.method == "lora"
        preset = self.policy.config.get_optimizer_preset()
        rate = config.learning_rate or preset.lr * (LORA_RATE if lora else 1.0)
        return TrainPipelineConfig(
            dataset=dataset,
            policy=self.policy.config,
            seed=seed,
            batch_size=config.batch_size,
            steps=steps,
            num_workers=config.num_workers,
            optimizer=replace(preset, lr=rate),
            # The presets' schedules are made for runs of many thousand steps.
            scheduler=DiffuserSchedulerConfig(name="cosine", num_warmup_steps=steps // 20),
            peft=config.peft if lora else None,
        )

    def fit(
        self,
        dataset: DatasetConfig,
        steps: int,
        seed: int,
        label: str = "fine-tuning",
        on_step: Callable[[list[float], float], None] = lambda losses, seconds: None,
    ) -> list[float]:
        """Train on a LeRobotDataset; return the loss of every step.

        Args:
            dataset: as for ``lerobot-train``.
            steps: gradient steps.
            seed: of the batches and the noise in the loss.
            label: shown on the progress bar.
            on_step: called after every step with the losses and the seconds so far.

        Raises:
            UserError: the dataset does not fit the policy; the loss became NaN or Inf.
        """
        from lerobot.optim.factory import make_optimizer_and_scheduler
        from lerobot.scripts.lerobot_train import update_policy
        from lerobot.utils.logging_utils import AverageMeter, MetricsTracker
        from lerobot.utils.random_utils import set_seed

        pipeline = self.pipeline(dataset, steps, seed)
        set_seed(seed)
        data, source = self._open(pipeline, self.config.num_workers)
        optimizer, scheduler = make_optimizer_and_scheduler(pipeline, self.model)
        optimizer, scheduler = self.accelerator.prepare(optimizer, scheduler)
        meters = {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s", "gpu_mem_gb")}
        tracker = MetricsTracker(
            pipeline.batch_size, data.num_frames, data.num_episodes, meters, accelerator=self.accelerator
        )
        losses: list[float] = []
        started = time.perf_counter()
        bar = Progress(range(1, steps + 1), desc=label, unit="step", leave=False)
        for step in bar:
            batch = next(source)
            with _blaming_dataset(first=step == 1):
                update_policy(
                    tracker,
                    self.prepared,
                    self._preprocess(batch, data),
                    optimizer,
                    pipeline.optimizer.grad_clip_norm,
                    accelerator=self.accelerator,
                    lr_scheduler=scheduler,
                )
            loss = tracker.metrics["loss"].val
            if not math.isfinite(loss):
                raise UserError(
                    "--learning_rate", f"the loss became {loss} at step {step}; nothing was saved; lower it"
                )
            losses.append(loss)
            self.updates += 1
            on_step(losses, time.perf_counter() - started)
            if step % 50 == 1:
                bar.set_postfix_str(f"loss {sum(losses[-100:]) / len(losses[-100:]):.4f}")
        self.policy.eval()
        return losses

    def check(self, dataset: DatasetConfig) -> Any:
        """Read one batch of ``dataset`` before any long work; returns LeRobot's dataset.

        Raises:
            UserError: it does not fit the policy.
        """
        data, source = self._open(self.pipeline(dataset, 1, 0), 0)
        batch = next(source)
        with _blaming_dataset(first=True):
            self._preprocess(batch, data)
        return data

    def _open(self, pipeline: TrainPipelineConfig, workers: int) -> tuple[Any, Iterator[dict[str, Any]]]:
        from lerobot.datasets.factory import make_dataset

        config, chosen = self.policy.config, pipeline.dataset
        data = open_dataset("--dataset", chosen.repo_id, chosen.root, lambda: make_dataset(pipeline))
        check_features(data, self.adapter, self.options.rename_map)
        drop = self.config.drop_last_frames
        return data, batches(data, config, pipeline.batch_size, pipeline.seed or 0, workers, drop)

    def _preprocess(self, batch: dict[str, Any], data: Any) -> dict[str, Any]:
        for key in data.meta.camera_keys:  # as lerobot-train does
            if key in batch and batch[key].dtype == torch.uint8:
                batch[key] = batch[key].float() / 255.0
        return self.adapter.preprocessor(batch)

    def save(self, folder: Path) -> PolicyAdapter:
        """Write the result, whole or not at all: a PEFT adapter folder, or a policy folder.

        Returns:
            The policy as loaded from ``folder``, checked to act as the one in memory.

        Raises:
            RuntimeError: it does not, or the base's files have changed.
        """
        from lerobot.configs import PreTrainedConfig

        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            self.model.save_pretrained(work)
            # The config as it was saved: this run's device and sampler are no part of the policy.
            config = PreTrainedConfig.from_pretrained(str(self.folder))
            if self.config.method == "lora":
                config.use_peft, config.pretrained_path = True, self.folder
            config.save_pretrained(work)
            with processor_files(self.adapter, self.folder) as source:
                for name in (PREPROCESSOR, POSTPROCESSOR, *state_files(source)):
                    shutil.copyfile(source / name, work / name)
            work.chmod(0o755)
            os.replace(work, folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        if self._hashes() != self.base_hashes:
            raise RuntimeError(
                "the base policy's files changed while it was fine-tuned; this is a bug of trimtab"
            )
        saved = load_adapter(replace(self.options, path=str(folder), revision=None))
        generator = torch.Generator().manual_seed(0)
        observation = self.adapter.example_observation(2, generator)
        noise = torch.randn((2, *saved.noise_spec.shape), generator=generator)
        noise = noise.to(saved.device, saved.noise_spec.dtype)
        here, there = (a.denoise(a.observe(observation), noise).float() for a in (self.adapter, saved))
        if not torch.allclose(here, there, rtol=1e-3, atol=1e-4):
            raise RuntimeError("the saved policy does not act as the trained one; this is a bug of trimtab")
        return saved

    def _hashes(self) -> dict[str, str]:
        return {"weights": hash_files(self.base_files), **settings_hashes(self.folder)}


@contextmanager
def _blaming_dataset(first: bool) -> Iterator[None]:
    """What the policy raises on the first batch is the dataset's fault; later it is a bug.

    Raises:
        UserError: in place of what the policy raised.
    """
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        if not first or isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            "--dataset.repo_id", f"the dataset does not fit the policy: {reason(error)}"
        ) from error
