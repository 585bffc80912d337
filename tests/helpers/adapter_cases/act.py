"""ACT: one camera, two cameras, states alone; the latent given where LeRobot feeds zeros."""

from tests.helpers.adapter_cases import Case


def with_latent(adapter, batch, noise):
    """LeRobot's public chunk, the zeros replaced at the door of the layer that takes them."""
    layer = adapter.policy.model.encoder_latent_input_proj
    handle = layer.register_forward_pre_hook(lambda module, args: (noise,))
    try:
        return adapter.policy.predict_action_chunk(dict(batch))
    finally:
        handle.remove()


CASES = [
    Case("act", with_latent),
    Case("act", with_latent, {"cameras": 2, "pre_norm": True}),
    Case("act", with_latent, {"cameras": 0, "env_dim": 7}),
]
