"""What most vision-language-action policies have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from trimtab.adapters import NoiseSpec, PolicyAdapter


class VLAAdapter(PolicyAdapter):
    """A policy that reads a task, resizes its images and denoises a chunk of ``n_action_steps`` or more.

    Attributes:
        noise_fields: fields of the config that hold the shape of its noise.
    """

    reads_task = True
    resizes_images = True
    noise_fields: ClassVar[tuple[str, str]] = ("chunk_size", "max_action_dim")

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        super().__init__(policy, preprocessor, postprocessor)
        config = policy.config
        self.noise_spec = NoiseSpec(tuple(getattr(config, name) for name in self.noise_fields))
        self.chunk_shape = (config.n_action_steps, config.action_feature.shape[0])
