"""Every field of a tiny policy's config.json, set to what a hand or another version may leave there."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from tests.helpers.adapter_cases import noise_like
from trimtab.adapters import UserError, load_adapter
from trimtab.adapters.checkpoint.files import CONFIG, POSTPROCESSOR, PREPROCESSOR
from trimtab.adapters.checkpoint.saved_config import SIDES
from trimtab.adapters.loading import quietly

ABSENT = object()
VALUES = (ABSENT, None, {}, [], "nonsense", -1, 0, 0.5, True, 3)
BROKEN = (None, {}, [], "nonsense", 0)
# What loading changes on purpose, with a note or without effect on the actions.
CHANGED = {
    *("device", "pretrained_path"),
    *("compile_model", "rtc_config", "noise_scheduler_type", "num_inference_steps"),
    *("pretrained_backbone_weights", "enable_gradient_checkpointing", "enable_world_model"),
    *("attn_mode", "attn_implementation", "use_flash_attn", "inference_action_mode", "torch_dtype"),
    "use_cache",
    # Where the backbone and the tokenizer lie on this machine.
    *("vlm_model_name", "vlm_base", "vision_encoder_name", "text_encoder_name", "base_model_path"),
    *("qwen_model_name", "checkpoint_path", "checkpoint_force_download", "pretrained_name_or_path"),
    *("wan_pretrained_path", "text_encoder_model_id", "tokenizer_model_id"),
}


@dataclass
class Outcome:
    """What became of one input.

    ``kind`` is refused (by LeRobot's config class too), refused here (by us alone, or by what LeRobot builds
    of the config), same, as LeRobot, traceback or difference.
    """

    field: str
    value: Any
    kind: str
    said: str = ""

    def __str__(self) -> str:
        value = "absent" if self.value is ABSENT else json.dumps(self.value)
        return f"{self.field}={value}: {self.kind}: {self.said}"


@contextmanager
def limited_memory() -> Iterator[None]:
    """A config that asks for tens of gigabytes shall be a find, not the end of the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def inputs(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """All (field, value) that differ from ``config``."""
    named = [name for name in config if name != "type"]
    found = [(name, value) for name in named for value in VALUES if value is ABSENT or value != config[name]]
    for name in named:  # a null further in
        held = config[name]
        if held and isinstance(held, dict):
            found.append((name, {**held, next(iter(held)): None}))
        elif held and isinstance(held, list):
            found.append((name, [None, *held[1:]]))
    return [*found, ("no_such_field", 1), ("type", None), ("type", {})]


class Fuzz:
    """A tiny policy whose config.json is changed over and over; everything else stays.

    Args:
        case: of ``tests.helpers.adapter_cases``; says how LeRobot itself makes a chunk.
        options: how the policy is loaded.
    """

    def __init__(self, case: Any, options: Any) -> None:
        self.case, self.options = case, options
        self.folder = Path(options.path)
        self.config = json.loads((self.folder / "config.json").read_text())
        self.usual = self._actions(load_adapter(options))
        self.usual_config = self._saved()

    def outcome(self, field: str, value: Any) -> Outcome:
        content = dict(self.config)
        content.pop(field, None)
        if value is not ABSENT:
            content[field] = value
        return self.outcome_of(CONFIG, content, field, value)

    def processor_inputs(self) -> Iterator[tuple[str, Any, str, Any]]:
        """For ``outcome_of``, of the processors' files: without each step, its entries changed."""
        for name in (PREPROCESSOR, POSTPROCESSOR):
            content = json.loads((self.folder / name).read_text())
            for value in (ABSENT, *BROKEN):
                changed = {k: v for k, v in content.items() if k != "steps"}
                changed |= {} if value is ABSENT else {"steps": value}
                yield name, changed, f"{name}: steps", value
            for index, step in enumerate(content["steps"]):
                others = [*content["steps"][:index], *content["steps"][index + 1 :]]
                label = f"{name}: step {step.get('registry_name')}"
                yield name, {**content, "steps": others}, label, ABSENT
                for entry in step:
                    for value in (ABSENT, *BROKEN):
                        edited = {k: v for k, v in step.items() if k != entry}
                        edited |= {} if value is ABSENT else {entry: value}
                        steps = [*content["steps"][:index], edited, *content["steps"][index + 1 :]]
                        yield name, {**content, "steps": steps}, f"{label}.{entry}", value

    def outcome_of(self, name: str, content: Any, field: str, value: Any) -> Outcome:
        """What becomes of the policy when the file ``name`` holds ``content``."""
        path = self.folder / name
        before = path.read_text()
        path.write_text(json.dumps(content))
        try:
            return Outcome(field, value, *self._tried(name == CONFIG and field not in SIDES))
        finally:
            path.write_text(before)

    def _tried(self, has_to_load: bool) -> tuple[str, str]:
        """``has_to_load``: if LeRobot reads the config as before (fastwam fills in features of its own)."""
        try:
            saved = self._saved()
        except Exception:
            saved = None
        try:
            with quietly():
                adapter = load_adapter(self.options)
        except UserError as error:
            assert "\n" not in str(error)
            if "allocate memory" in str(error):  # no value here asks for much
                return "difference", str(error)
            if has_to_load and saved == self.usual_config:
                return "difference", f"refused, where LeRobot reads the config as before: {error}"
            return "refused" if saved is None else "refused here", str(error)
        except BaseException as error:
            return "traceback", f"{type(error).__name__}: {error}"
        if saved is None:
            return "difference", "loads, where LeRobot refuses the config"
        changed = self._changed(saved, adapter) - CHANGED
        if changed:
            return "difference", f"loading changed {', '.join(sorted(changed))}"
        ours = self._actions(adapter)
        same = ours.shape == self.usual.shape and torch.allclose(ours, self.usual, atol=1e-6)
        try:
            theirs, steps = self._public(adapter)
        except Exception as error:
            if same:
                return "same", f"(LeRobot: {type(error).__name__}: {str(error)[:80]})"
            return "difference", f"other actions, where LeRobot says {type(error).__name__}: {error}"
        if steps != ours.shape[1]:
            return "difference", f"{ours.shape[1]} steps are executed, {steps} by LeRobot"
        if not torch.allclose(ours, theirs, atol=1e-5):
            return "difference", f"actions differ from LeRobot's by {(ours - theirs).abs().max():.2g}"
        return ("same" if same else "as LeRobot"), ""

    def _saved(self) -> Any:
        """The config as LeRobot reads it."""
        from lerobot.configs import PreTrainedConfig

        return PreTrainedConfig.from_pretrained(self.options.path)

    def _changed(self, saved: Any, adapter: Any) -> set[str]:
        saved.validate_features()  # which fills in more, and which LeRobot's policies call
        now = adapter.config
        return {f.name for f in fields(saved) if getattr(saved, f.name) != getattr(now, f.name)}

    def _seen(self, adapter: Any) -> Any:
        return adapter.example_observation(adapter.max_batch or 2, torch.Generator().manual_seed(3))

    def _actions(self, adapter: Any) -> torch.Tensor:
        conditioning = adapter.observe(self._seen(adapter))
        chunk = adapter.denoise(conditioning, noise_like(adapter, conditioning.batch_size))
        return adapter.postprocess(chunk, conditioning).float()

    def _public(self, adapter: Any) -> tuple[torch.Tensor, int]:
        """LeRobot's own actions, and how many of a chunk it executes."""
        observation = self._seen(adapter)
        noise = adapter.native_noise(noise_like(adapter, adapter.max_batch or 2))
        chunk = self.case.public(adapter, adapter.preprocess(observation), noise)
        executed = adapter.executed(chunk)
        steps = executed.shape[1]
        if self.case.type not in ("groot", "lingbot_va"):  # which execute what their model says
            steps = min(chunk.shape[1], getattr(adapter.config, "n_action_steps", steps))
        conditioning = adapter.observe(observation)  # for policies with relative actions
        return adapter.postprocess(executed, conditioning).float(), steps
