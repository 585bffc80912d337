"""The base class of adapters: how a policy is loaded and checked, and what identifies it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.adapters.base import NoiseToChunk
from trimtab.adapters.checkpoint.backbone import without_weights
from trimtab.adapters.checkpoint.folder import weights_files
from trimtab.adapters.checkpoint.identity import hash_files, placement, settings_hashes, weights_hash
from trimtab.adapters.config import PolicyConfig
from trimtab.adapters.inputs import check_inputs
from trimtab.adapters.verification import verify


class PolicyAdapter(NoiseToChunk):
    """Wraps one frozen LeRobot policy and exposes its sampling noise as an input.

    A subclass sets ``noise_spec`` and ``chunk_shape`` and writes ``encode`` and ``denoise``; the rest has
    defaults that suit a policy which looks at one observation and takes its batch as (B, ...).

    Attributes:
        steps_field: field of the config that ``--policy.num_inference_steps`` sets; ``None`` where
            ``prepare_config`` takes the option.
        dtype_field: field that ``--policy.dtype`` sets, where the config has it.
        dtypes: the precisions that the policy runs in; empty = any.
        backbone_fields: fields that ``--policy.backbone`` sets; empty where there is no such option.
        loads_backbone: whether LeRobot would load the backbone's weights before the checkpoint's.
        takes_tokenizer: whether ``--policy.tokenizer`` has an effect.
        tokenizer_step: (name of a preprocessor's step, its entry) that names the tokenizer.
        notes: lines to show the user about what was changed at load.
        weights_files: the files that the weights were loaded from; empty where a loader did not say.
        trainable: names of the parameters that the policy's own class leaves open to training.
    """

    steps_field: ClassVar[str | None] = None
    dtype_field: ClassVar[str] = "dtype"
    dtypes: ClassVar[tuple[str, ...]] = ()
    backbone_fields: ClassVar[tuple[str, ...]] = ()
    loads_backbone: ClassVar[bool] = False
    takes_tokenizer: ClassVar[bool] = True
    tokenizer_step: ClassVar[tuple[str, str]] = ("tokenizer_processor", "tokenizer_name")

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        super().__init__(policy, preprocessor, postprocessor)
        self.notes: list[str] = []
        self.weights_files: list[Path] = []
        self.trainable: set[str] = set()

    # Loading: what differs between policies. LeRobot's own `from_pretrained` is not used, for some of
    # them return random weights where a file is missing.

    @classmethod
    def prepare_config(cls, config: Any, options: PolicyConfig) -> list[str]:
        """Change the policy's config, in which the options are set, before the policy is built.

        Returns:
            A line for each change that the user should know of.
        """
        return []

    @classmethod
    def build(cls, config: Any) -> Any:
        """The policy that ``config`` describes, with any weights."""
        from lerobot.policies.factory import get_policy_class

        with without_weights(config, *(cls.backbone_fields if cls.loads_backbone else ())):
            return get_policy_class(config.type)(config)

    @classmethod
    def frozen_parts(cls, policy: Any) -> dict[str, tuple[torch.nn.Module, Path]]:
        """Models that the policy runs but its checkpoint does not hold, by name, with their folders.

        Loading compares them with their files, and ``identity`` covers them. All have been built.
        """
        return {}

    @classmethod
    def prepare_weights(cls, saved: dict[str, Tensor], policy: Any) -> dict[str, Tensor]:
        """Rename tensors of older files as LeRobot's own loader does."""
        return saved

    @classmethod
    def cast(cls, policy: Any, dtype: torch.dtype) -> None:
        """Change the precision of a loaded policy whose config has no ``dtype``.

        Everything that the weights file holds changes. Other buffers (rotary frequencies, position tables)
        keep theirs, for they are computed, not learnt.
        """
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

    # What the policy is.

    @property
    def parameter_count(self) -> int | None:
        """Number of the policy's parameters; ``None`` where they are out of sight."""
        return sum(parameter.numel() for parameter in self.policy.parameters())

    def identity(self, base: Path | str) -> dict[str, Any]:
        """What tells this base from any other, as JSON values.

        Args:
            base: folder of the base, or address of its server.

        Returns:
            ``sha256`` of the weights' files; ``files``, the hashes of all else that makes the function;
            ``weights_sha256`` of the weights in memory, with their ``weights_dtype`` and ``weights_device``.
        """
        base, parts = Path(base), self.frozen_parts(self.policy)
        return {
            "sha256": hash_files(self.weights_files or weights_files(base)),
            "files": settings_hashes(base, {name: folder for name, (_, folder) in parts.items()}),
            "weights_sha256": weights_hash(self.policy, *(module for module, _ in parts.values())),
            **placement(self.policy),
        }

    def check_identity(self, identity: dict[str, Any], base: Path | str) -> None:
        """Raise where the base is no longer the one that ``identity`` described.

        Raises:
            RuntimeError: a file or the weights in memory have changed.
        """
        now = self.identity(base)
        if now != identity:
            odd = ", ".join(sorted(k for k in now.keys() | identity.keys() if now.get(k) != identity.get(k)))
            raise RuntimeError(
                f"the base policy changed while it was steered ({odd}); this is a bug of trimtab"
            )

    # What it takes, and whether noise steers it.

    def check_observation(self, observation: dict[str, Any]) -> None:
        check_inputs(self, observation)

    def verify(self) -> None:
        """Check on the real weights that noise steers this policy, and steers it alone.

        On two observations, each alone and both together: chunks and actions have the declared shapes and are
        finite, features too; the same observation and noise give the same chunk, encoded twice; another noise
        gives each row another chunk, and in entries that are declared inert the same; a row does not depend
        on the rows beside it.

        Raises:
            UserError: one of these does not hold, with what it means.
            RuntimeError: rows of a batch influence each other.
        """
        verify(self)
