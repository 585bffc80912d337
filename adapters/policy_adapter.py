"""The base class of adapters: how a policy is loaded and checked, and what identifies it."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.adapters.base import NoiseToChunk
from trimtab.adapters.checkpoint.folder import weights_files, without_weights
from trimtab.adapters.checkpoint.identity import hash_files, placement, settings_hashes, weights_hash
from trimtab.adapters.config import PolicyConfig
from trimtab.adapters.inputs import check_inputs
from trimtab.adapters.verification import verify


class PolicyAdapter(NoiseToChunk):
    """Wraps one frozen LeRobot policy and exposes its sampling noise as an input.

    A subclass sets ``noise_spec`` and ``chunk_shape`` and writes ``encode`` and ``denoise``; the rest has
    defaults that suit a policy which looks at one observation and takes its batch as (B, ...).
    """

    # Field of the config that --policy.num_inference_steps sets; None where prepare_config takes the option.
    steps_field: ClassVar[str | None] = None
    dtype_field: ClassVar[str] = "dtype"  # that --policy.dtype sets, where the config has it
    dtypes: ClassVar[tuple[str, ...]] = ()  # precisions that it runs in; empty = any
    backbone_fields: ClassVar[tuple[str, ...]] = ()  # that --policy.backbone sets; empty = no such option
    loads_backbone: ClassVar[bool] = (
        False  # LeRobot would load the backbone's weights before the checkpoint's
    )
    takes_tokenizer: ClassVar[bool] = True  # --policy.tokenizer has an effect
    # (name of a preprocessor's step, its entry) that names the tokenizer.
    tokenizer_step: ClassVar[tuple[str, str]] = ("tokenizer_processor", "tokenizer_name")

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        super().__init__(policy, preprocessor, postprocessor)
        self.notes: list[str] = []  # lines to show the user about what was changed at load
        self.weights_files: list[Path] = []  # that the weights were loaded from; empty where nobody said
        self.trainable: set[str] = set()  # parameters that the policy's own class leaves open to training

    # Loading: what differs between policies. LeRobot's own `from_pretrained` is not used, for some of
    # them return random weights where a file is missing.

    @classmethod
    def prepare_config(cls, config: Any, options: PolicyConfig) -> list[str]:
        """Change the policy's config, in which the options are set; return a line for each change."""
        return []

    @classmethod
    def build(cls, config: Any) -> Any:
        """The policy that ``config`` describes, with any weights."""
        from lerobot.policies.factory import get_policy_class

        with without_weights(config, *(cls.backbone_fields if cls.loads_backbone else ())):
            return get_policy_class(config.type)(config)

    @classmethod
    def frozen_parts(cls, policy: Any) -> dict[str, tuple[torch.nn.Module, Path]]:
        """Models that the policy runs but its checkpoint does not hold, by name, with their folders."""
        return {}

    @classmethod
    def prepare_weights(cls, saved: dict[str, Tensor], policy: Any) -> dict[str, Tensor]:
        """Rename tensors of older files as LeRobot's own loader does."""
        return saved

    @classmethod
    def cast(cls, policy: Any, dtype: torch.dtype) -> None:
        """Change the precision of what the weights file holds, not of buffers that are computed."""
        for tensor in policy.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)

    @classmethod
    def processor_overrides(cls, config: Any, options: PolicyConfig) -> dict[str, dict[str, Any]]:
        """Overrides for the saved preprocessor, by step name, beside the device's."""
        name = options.tokenizer or (options.backbone if cls.backbone_fields else None)
        step, entry = cls.tokenizer_step
        return {step: {entry: name}} if name and cls.takes_tokenizer else {}

    def close(self) -> None:
        """Let go of what the adapter holds outside this process."""

    @property
    def parameter_count(self) -> int | None:
        """Number of the policy's parameters; ``None`` where they are out of sight."""
        return None if self.policy is None else sum(p.numel() for p in self.policy.parameters())

    def identity(self, base: Path | str) -> dict[str, Any]:
        """What tells this base, in a folder or at a server's address, from any other, as JSON values.

        ``sha256`` is of the weights' files, ``files`` has the hashes of all else that makes the function,
        ``weights_sha256`` is of the weights in memory (``weights_dtype``, ``weights_device``).
        """
        base, parts = Path(base), self.frozen_parts(self.policy)
        return {
            "sha256": hash_files(self.weights_files or weights_files(base)),
            "files": settings_hashes(base, {name: folder for name, (_, folder) in parts.items()}),
            "weights_sha256": weights_hash(self.policy, *(module for module, _ in parts.values())),
            **placement(self.policy),
        }

    def check_identity(self, identity: dict[str, Any], base: Path | str) -> None:
        """Raise ``RuntimeError`` where the base is no longer the one that ``identity`` described."""
        now = self.identity(base)
        if now != identity:
            odd = ", ".join(sorted(k for k in now.keys() | identity.keys() if now.get(k) != identity.get(k)))
            raise RuntimeError(
                f"the base policy changed while it was steered ({odd}); this is a bug of trimtab"
            )

    def check_observation(self, observation: dict[str, Any]) -> None:
        check_inputs(self, observation)

    def verify(self) -> None:
        """Check on the real weights, on two observations, that noise steers this policy, and steers it alone.

        README.md says what is checked. ``UserError`` where it does not hold; ``RuntimeError`` where a row of
        a batch depends on the rows beside it.
        """
        verify(self)
