"""Config of the LeRobot policy type ``trimtab``: what an artefact's config.json holds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lerobot.configs import PreTrainedConfig

from trimtab.adapters import PolicyConfig, UserError
from trimtab.adapters.checkpoint.folder import is_server
from trimtab.adapters.errors import at_least
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpaceConfig
from trimtab.policies.observe import ObserveConfig

TYPE = "trimtab"
FORMAT = 3  # of the artefact; another one is refused


@dataclass
class BaseReference(PolicyConfig):
    """The base that an artefact steers: where it lies, how it was loaded, what tells it from any other.

    A path of a local folder is relative to the artefact's folder, and begins with a dot.
    """

    policy_type: str | None = None
    # What ``PolicyAdapter.identity`` says of it. Of files:
    sha256: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    weights_sha256: str | None = None
    weights_dtype: str | None = None
    weights_device: str | None = None
    # Of a policy server: what it answered.
    answer: Any = None
    tolerance: Any = None

    def location(self, folder: Path) -> str:
        """Where it lies, for the artefact in ``folder``: a folder, a Hub repository or a server's address."""
        if self.path is None:
            raise UserError("--policy.base.path", f"the artefact {folder} names no base policy")
        candidate = folder / Path(self.path).expanduser()
        return str(candidate.resolve()) if not is_server(self.path) and candidate.exists() else self.path


@PreTrainedConfig.register_subclass(TYPE)
@dataclass
class TrimtabConfig(PreTrainedConfig):
    """A noise actor and a reference to the frozen base policy that it steers.

    ``n_obs_steps``, ``input_features`` and ``output_features`` are the base's own.
    """

    format: int = FORMAT
    # The base; a command line names another one by --policy.base.path=.
    base: BaseReference = field(default_factory=BaseReference)
    noise: NoiseSpaceConfig = field(default_factory=FullNoiseConfig)
    # Shape of one noise of the base, and length of the features that the actor sees, pixels apart.
    noise_shape: list[int] = field(default_factory=list)
    feature_dim: int = 0
    # What else than the base's own features the actor looks at, if anything.
    observe: ObserveConfig | None = None
    actor: ActorConfig = field(default_factory=ActorConfig)
    # The action critic of a best_of_n run, where one is stored (critic.safetensors).
    critic: CriticConfig | None = None
    # Smallest and largest value that it can give; without them its output is the value itself.
    critic_bounds: list[float] | None = None
    # Largest change that its edits make in a chunk (edit.safetensors), in normalised actions; 0: it has none.
    edit_scale: float = 0.0
    # Actions of each chunk that are executed.
    n_action_steps: int = 1
    # Take the actor's mean instead of a sample.
    deterministic: bool = True
    # False: the plain base under its own noise.
    use_actor: bool = True
    # N > 1: decode the actor's noise and N - 1 of the base's, and take the best by the critic.
    num_candidates: int = 1
    # False: chunks as the base makes them of the chosen noise, where edits would change them.
    use_edit: bool = True
    # Run the actor through torch.compile (`lerobot-rollout --use_torch_compile` sets it).
    compile_model: bool = False
    # Facts about the training run, for whoever reads the file.
    training: dict[str, Any] = field(default_factory=dict)

    observation_delta_indices = action_delta_indices = reward_delta_indices = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_amp:
            raise UserError(
                "--policy.use_amp",
                "a steered policy computes in the precision that it was steered in; leave it false",
            )
        at_least(1, self, "--policy.", "num_candidates")
        at_least(0, self, "--policy.", "edit_scale")
        if self.num_candidates > 1 and self.critic is None:
            raise UserError(
                "--policy.num_candidates",
                "needs the critic of a best_of_n run, and this artefact holds none; leave it at 1",
            )

    @property
    def chunk_size(self) -> int:
        """Length of the chunks that ``predict_action_chunk`` returns."""
        return self.n_action_steps

    def get_optimizer_preset(self) -> Any:
        raise UserError(
            "--policy.type", f"a {TYPE} policy is not trained by lerobot-train; use trimtab adapt"
        )

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        """The base's own, which it has validated."""
