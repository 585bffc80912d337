"""How a user names a base policy: the options under ``--policy.``."""

from dataclasses import dataclass, field

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class RemoteConfig:
    """A policy on an openpi server (``--policy.path=ws://host:port``): what it is sent and how it answers."""

    # The server's name for each observation; a dot nests (images.cam_high). Default: as for LIBERO.
    keys: dict[str, str] = field(
        default_factory=lambda: {
            "observation.images.image": "observation/image",
            "observation.images.image2": "observation/wrist_image",
            "observation.state": "observation/state",
        }
    )
    # Length of each observation that is not an image.
    dims: dict[str, int] = field(default_factory=lambda: {"observation.state": 8})
    # Images are resized to this height and width and padded with black, as openpi's clients do (0: as is).
    image_size: int = 224
    # Send images as (channels, height, width), as for ALOHA; else (height, width, channels).
    channels_first: bool = False
    # Names under which the instruction and the noise travel beside the observations.
    prompt_key: str = "prompt"
    noise_key: str = "noise"
    # [horizon, dimension] of the noise, where the server's metadata names no `noise_shape`; default: the
    # length of its chunks, and 32 as in all of openpi's models.
    noise_shape: list[int] | None = None
    # Steps of each chunk that are executed; default: all.
    n_action_steps: int | None = None
    # Let the noise actor see the model's last prefix token too (servers with dsrl_pi0's `get_prefix_rep`).
    prefix_features: bool = False
    # Seconds to wait for an answer. The first one may take long, for it compiles the model.
    timeout: float = 120.0


@dataclass
class PolicyConfig:
    """The base policy: ``--policy.path`` and how to load it."""

    # Folder that `lerobot-train` or `trimtab base` wrote, a Hub repository, or an openpi server (ws://...).
    path: str | None = None
    # Revision on the Hub: branch, tag or commit.
    revision: str | None = None
    # Device of the base policy (cpu, cuda, mps); default: the best there is.
    device: str | None = None
    # Precision of the base policy's weights (float32, bfloat16, float16); default: as its config says.
    dtype: str | None = None
    # How it encodes and denoises: eager; compile: networks through torch.compile; cuda_graph: recorded and
    # replayed. Where that cannot be, a line says so, and it runs as it is.
    engine: str = "eager"
    # Denoising steps; default: as saved (10 where a DDPM checkpoint is switched to DDIM).
    num_inference_steps: int | None = None
    # Actions of each chunk that are executed before the next observation; default: as saved.
    n_action_steps: int | None = None
    # Folder of the tokenizer, where the one that the checkpoint names cannot be fetched.
    tokenizer: str | None = None
    # Folder of the vision-language backbone, where the one that the checkpoint names cannot be fetched.
    backbone: str | None = None
    # Base policy of a PEFT (LoRA) checkpoint, where it no longer lies where its adapter_config.json says;
    # of an artefact: the new address of its base's policy server.
    base_path: str | None = None
    # Other names for the environment's observations, as in `lerobot-eval --rename_map`.
    rename_map: dict[str, str] = field(default_factory=dict)
    # What a policy server is sent.
    remote: RemoteConfig = field(default_factory=RemoteConfig)
