"""Adapter of LeRobot's ``act`` policy (a conditional VAE whose decoder is a transformer).

ACT draws no noise when it acts: LeRobot feeds the decoder the mean of the VAE's prior, a latent of zeros.
The adapter steers that latent: noise of shape (latent_dim,), standard normal, for that is the prior which
training pulled the latent towards. So *noise zero is the base policy*, to the bit, and a standard normal draw
is the VAE's generative model, which nobody has run; ``noise_spec.distribution`` is ``zero`` to say so. A
policy whose KL term collapsed ignores its latent: measure before steering.

``encode`` runs the image backbone and keeps its tokens; the latent is one more token of the transformer,
which so runs whole for every noise.
"""

from typing import Any, ClassVar

import torch
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE
from torch import Tensor

from trimtab.adapters import Conditioning, NoiseSpec, PolicyAdapter, PolicyConfig, UserError, policy_error


class ACTAdapter(PolicyAdapter):
    """Features: mean of the tokens that enter the transformer, and the normalised states."""

    policy_type: ClassVar[str] = "act"
    takes_tokenizer = False
    dtypes = ("float32",)  # LeRobot makes its latent in float32

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        super().__init__(policy, preprocessor, postprocessor)
        config = policy.config
        self.noise_spec = NoiseSpec((config.latent_dim,), distribution="zero")
        self.chunk_shape = (config.n_action_steps, config.action_feature.shape[0])

    @classmethod
    def prepare_config(cls, config: Any, options: PolicyConfig) -> list[str]:
        """Refuse what has no latent, or no chunk that one latent decides, and options without effect."""
        if not config.use_vae:
            raise policy_error(
                "this act policy was trained without its VAE (use_vae=false): it has no latent to steer"
            )
        if config.temporal_ensemble_coeff is not None:
            raise policy_error(
                "this act policy executes averages over all chunks so far (temporal_ensemble_coeff="
                f"{config.temporal_ensemble_coeff}), so no one noise decides what is executed; in its "
                "config.json, set temporal_ensemble_coeff to null and n_action_steps to the steps to execute "
                f"of each chunk (at most {config.chunk_size})"
            )
        if options.num_inference_steps is not None:
            raise UserError(
                "--policy.num_inference_steps", "an act policy decodes in one step; drop the option"
            )
        return []

    def encode(self, batch: dict[str, Any]) -> Conditioning:
        """Run LeRobot's own forward pass, latent zero, and keep what is about to enter its transformer."""
        entering: dict[str, Tensor] = {}

        def catch(module: Any, args: tuple, kwargs: dict) -> None:
            count = args[0].shape[1]
            entering["tokens"] = args[0].transpose(0, 1)
            entering["positions"] = kwargs["pos_embed"].expand(-1, count, -1).transpose(0, 1)
            entering["features"] = args[0][1:].mean(0)  # without the latent's token
            raise _Enough  # the transformer's turn comes with the noise

        handle = self.policy.model.encoder.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.policy.predict_action_chunk(dict(batch))
        except _Enough:
            pass
        finally:
            handle.remove()
        states = [batch[key] for key in (OBS_STATE, OBS_ENV_STATE) if key in batch]
        entering["features"] = torch.cat([entering["features"], *states], -1)
        return Conditioning(entering)

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        model = self.policy.model
        tokens = conditioning.rows("tokens").transpose(0, 1)
        positions = conditioning.rows("positions").transpose(0, 1)
        latent = model.encoder_latent_input_proj(noise)
        memory = model.encoder(torch.cat([latent.unsqueeze(0), tokens[1:]]), pos_embed=positions)
        queries = model.decoder_pos_embed.weight.unsqueeze(1)
        hidden = model.decoder(
            torch.zeros_like(queries).expand(-1, len(noise), -1),
            memory,
            encoder_pos_embed=positions,
            decoder_pos_embed=queries,
        )
        return self.executed(model.action_head(hidden.transpose(0, 1)))


class _Enough(Exception):
    """Ends LeRobot's forward pass before its transformer."""
