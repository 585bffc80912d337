"""Fine-tuning of a LeRobot policy, by LoRA or in full, with LeRobot's own training step."""

import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lerobot.configs.default import DatasetConfig, PeftConfig
from lerobot.configs.train import TrainPipelineConfig
from torch import nn

from trimtab.adapters import PolicyAdapter, PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.files import POSTPROCESSOR, PREPROCESSOR, state_files, whole_folder
from trimtab.adapters.checkpoint.folder import is_peft, is_server, resolve_folder
from trimtab.adapters.checkpoint.identity import hash_files, settings_hashes
from trimtab.adapters.checkpoint.processors import processor_files
from trimtab.adapters.errors import at_least, reason
from trimtab.policies.artefact import is_artefact
from trimtab.recipes.finetune.data import batches, check_features
from trimtab.recipes.support.launched import launched_processes
from trimtab.rl.data.demonstration_data import open_dataset
from trimtab.rl.runs.progress import Progress

DATASET_STEPS = 20_000  # gradient steps by default
LOG_EVERY = 100  # gradient steps behind one number of the loss curve
LORA_RATE = 10.0  # LoRA learns best about ten times faster than full fine-tuning; LeRobot's docs do so too
# Where the default targets lie, for policies of which not every part should adapt.
TRUNKS = {"diffusion": "diffusion.unet."}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


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

    def __post_init__(self) -> None:
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
        options: the base policy; a copy of it is trained, its folder never written to.
        config: how to train.

    Attributes:
        adapter: acts with the weights as they are now.
        folder, base_sha256: of the base, and of its weights.
        updates: gradient steps taken.

    Raises:
        UserError: the policy cannot be fine-tuned; no layer of it matches the LoRA targets; several processes
            were launched.
    """

    def __init__(self, options: PolicyConfig, config: TuningConfig) -> None:
        from accelerate import Accelerator

        if launched_processes() > 1:  # as the environment says, whether or not the others are there
            raise UserError(
                "accelerate",
                "trimtab lora runs in one process, and WORLD_SIZE says there are more; unset it, or for many "
                "GPUs take `lerobot-train --peft...`",
            )
        if options.engine != "eager":
            raise UserError("--policy.engine", "a policy that is trained runs as it is; drop the option")
        path, option = options.path, "--policy.path"
        if not path:
            raise UserError(option, "name the folder or Hub repository of the base policy")
        if is_server(path):
            raise UserError(option, f"{path} is a policy server; its weights are out of reach")
        if is_artefact(path):
            raise UserError(option, f"{path} is a steered policy; name its base")
        self.folder = resolve_folder(path, options.revision).resolve()
        if is_peft(self.folder):
            raise UserError(option, f"{path} is itself a LoRA adapter; name the policy that it adapts")
        adapter = load_adapter(options)
        self.options, self.config = options, config
        self.adapter, self.policy, self.updates = adapter, adapter.policy, 0
        self.model: Any = self.policy
        self.base_sha256, self._settings = hash_files(adapter.weights_files), settings_hashes(self.folder)
        if config.method == "lora":
            self._add_lora(adapter)
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

    def _add_lora(self, base: PolicyAdapter) -> None:
        """Freeze the policy, put LoRA layers into it with LeRobot's ``wrap_with_peft``, and act through them.

        Without targets in the config, they are LeRobot's for the policy, or ``default_targets``; without an
        alpha, it is the rank (a scaling of 1).
        """
        policy, chosen = self.policy, self.config.peft
        policy.config.pretrained_path = self.folder
        overrides = {**asdict(chosen), "lora_alpha": chosen.lora_alpha or chosen.r}
        if not chosen.target_modules and not (policy._get_default_peft_targets() or {}).get("target_modules"):
            overrides["target_modules"] = default_targets(policy, base.policy_type, base.trainable)
        layers = [name for name, module in policy.named_modules() if isinstance(module, LAYERS)]
        try:
            self.model = policy.wrap_with_peft(peft_cli_overrides=overrides)
        except (ValueError, TypeError, re.error) as error:
            what = "matches no layer" if "not found" in str(error) else f"does not fit ({reason(error)})"
            raise UserError(
                "--peft.target_modules",
                f"{chosen.target_modules or 'the default'} {what} of this {base.policy_type} policy; its "
                f"layers are for instance {', '.join(layers[:: max(1, len(layers) // 4)][:4])}",
            ) from error
        if not Path(self.options.path).expanduser().exists():  # on the Hub: name it, not its cache
            saved = self.model.peft_config[self.model.active_adapter]
            saved.base_model_name_or_path, saved.revision = self.options.path, self.options.revision
        self.adapter = type(base)(policy, base.preprocessor, base.postprocessor)
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
        seed: int,
        label: str = "fine-tuning",
        steps: int = DATASET_STEPS,
        on_metrics: Callable[[dict[str, Any]], None] = lambda line: None,
        opened: Any = None,
    ) -> list[float]:
        """Train on a LeRobotDataset; return the loss of every step.

        Args:
            dataset: as for ``lerobot-train``.
            seed: of the batches and the noise in the loss.
            label: shown on the progress bar.
            steps: gradient steps, unless the config says how many.
            on_metrics: called with the mean loss of every ``LOG_EVERY`` steps.
            opened: what ``check`` made of ``dataset``, which is not opened again.

        Raises:
            UserError: the dataset does not fit the policy; the loss became NaN or Inf.
        """
        from lerobot.optim.factory import make_optimizer_and_scheduler
        from lerobot.scripts.lerobot_train import update_policy
        from lerobot.utils.logging_utils import AverageMeter, MetricsTracker
        from lerobot.utils.random_utils import set_seed

        steps = self.config.steps or steps
        pipeline = self.pipeline(dataset, steps, seed)
        set_seed(seed)
        data = self._open(pipeline) if opened is None else opened
        source = self._batches(data, pipeline, self.config.num_workers)
        optimizer, scheduler = self.accelerator.prepare(*make_optimizer_and_scheduler(pipeline, self.model))
        meters = {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s", "gpu_mem_gb")}
        tracker = MetricsTracker(
            pipeline.batch_size, data.num_frames, data.num_episodes, meters, accelerator=self.accelerator
        )
        losses: list[float] = []
        started = time.perf_counter()
        bar = Progress(range(1, steps + 1), desc=label, unit="step", leave=False)
        for step in bar:
            with _blaming_dataset() if step == 1 else nullcontext():
                update_policy(
                    tracker,
                    self.prepared,
                    next(source),
                    optimizer,
                    pipeline.optimizer.grad_clip_norm,
                    accelerator=self.accelerator,
                    lr_scheduler=scheduler,
                )
            losses.append(tracker.metrics["loss"].val)
            if not math.isfinite(losses[-1]):
                raise UserError(
                    "--learning_rate",
                    f"the loss became {losses[-1]} at step {step}; nothing was saved; lower it",
                )
            self.updates += 1
            if step % LOG_EVERY == 0 or step == steps:
                seconds = round(time.perf_counter() - started, 3)
                on_metrics({"step": step, "loss": means(losses)[-1], "seconds_total": seconds})
            if step % 50 == 1:
                bar.set_postfix_str(f"loss {fmean(losses[-100:]):.4f}")
        self.policy.eval()
        return losses

    def check(self, dataset: DatasetConfig) -> Any:
        """Read one batch of ``dataset`` before any long work, as ``fit`` will; returns LeRobot's dataset."""
        pipeline = self.pipeline(dataset, 1, 0)
        data = self._open(pipeline)
        with _blaming_dataset():
            next(self._batches(data, pipeline, 0))
        return data

    def _open(self, pipeline: TrainPipelineConfig) -> Any:
        """LeRobot's dataset, which has what the policy needs."""
        from lerobot.datasets.factory import make_dataset

        named = pipeline.dataset
        data = open_dataset("--dataset", named.repo_id, named.root, lambda: make_dataset(pipeline))
        check_features(data, self.adapter, self.options.rename_map)
        return data

    def _batches(self, data: Any, pipeline: TrainPipelineConfig, workers: int) -> Iterator[dict[str, Any]]:
        """Preprocessed batches without end."""
        size, seed, drop = pipeline.batch_size, pipeline.seed or 0, self.config.drop_last_frames
        source = batches(data, self.policy.config, size, seed, workers, drop)
        return map(partial(self._preprocess, data.meta.camera_keys), source)

    def _preprocess(self, cameras: list[str], batch: dict[str, Any]) -> dict[str, Any]:
        for key in cameras:  # as lerobot-train does
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

        with whole_folder(folder) as work:
            self.model.save_pretrained(work)
            # The config as it was saved: this run's device and sampler are no part of the policy.
            config = PreTrainedConfig.from_pretrained(str(self.folder))
            if self.config.method == "lora":
                config.use_peft, config.pretrained_path = True, self.folder
            config.save_pretrained(work)
            with processor_files(self.adapter, self.folder) as source:
                for name in (PREPROCESSOR, POSTPROCESSOR, *state_files(source)):
                    shutil.copyfile(source / name, work / name)
        now = hash_files(self.adapter.weights_files), settings_hashes(self.folder)
        if now != (self.base_sha256, self._settings):
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


@contextmanager
def _blaming_dataset() -> Iterator[None]:
    """What the policy raises on the first batch is the dataset's fault; later it is a bug."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            "--dataset.repo_id", f"the dataset does not fit the policy: {reason(error)}"
        ) from error


def means(losses: list[float]) -> list[float]:
    """The loss curve: the mean of every ``LOG_EVERY`` steps."""
    return [fmean(losses[start : start + LOG_EVERY]) for start in range(0, len(losses), LOG_EVERY)]


def default_targets(policy: nn.Module, policy_type: str, trainable: set[str]) -> list[str]:
    """The layers that LoRA adapts where LeRobot names none: linear and convolution layers.

    Only those whose weights the policy leaves open to training, in the part that ``TRUNKS`` names. Layers
    inside PyTorch's own attention are left out, for it reads their weights and never runs them.
    """
    modules = dict(policy.named_modules())
    attention = tuple(f"{name}." for name, m in modules.items() if isinstance(m, nn.MultiheadAttention))
    return [
        name
        for name, module in modules.items()
        if isinstance(module, LAYERS) and f"{name}.weight" in trainable
        if name.startswith(TRUNKS.get(policy_type, "")) and not name.startswith(attention)
    ]
