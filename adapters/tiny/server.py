"""A policy server in this process that speaks openpi's protocol, with a tiny LeRobot policy behind it.

For ``--tiny=true`` of recipes whose policy is on a server. It takes the noise that it is sent, as the DSRL
forks of openpi do.
"""

import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import draccus
import numpy as np
import torch

from trimtab.adapters import PolicyConfig, load_adapter
from trimtab.adapters.remote.openpi_client import pack, unpack

# Names of DROID's observations on the wire, as openpi's droid_policy.py has them, for what pusht gives.
KEYS = {
    "observation.image": "observation/exterior_image_1_left",
    "observation.state": "observation/joint_position",
}


@contextmanager
def serving(policy: dict[str, Any]) -> Iterator[str]:
    """Serve the policy that these options load for as long as the context lasts; yields the address."""
    from websockets.sync.server import serve

    adapter = load_adapter(draccus.decode(PolicyConfig, policy))
    lock = threading.Lock()

    def handle(connection: Any) -> None:
        connection.send(pack({"noise_shape": list(adapter.noise_spec.shape)}))
        for data in connection:
            try:
                with lock:
                    answer = pack({"actions": infer(adapter, unpack(data))})
            except Exception:
                connection.send(traceback.format_exc())
                return
            connection.send(answer)

    with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join(timeout=5)


@torch.no_grad()
def infer(adapter: Any, message: dict[str, Any]) -> np.ndarray:
    """Actions (steps, action_dim) for one observation, under the noise in it or under a draw of its own."""
    observation: dict[str, Any] = {"task": [message.get("prompt", "")]}
    for name, key in KEYS.items():
        value = torch.tensor(np.asarray(message[key]))
        if value.ndim == 3:  # a picture, as bytes
            value = value.permute(2, 0, 1).float() / 255
        observation[name] = value.float()[None, None]
    conditioning = adapter.observe(observation)
    shape = adapter.noise_spec.shape
    sent = message.get("noise")
    noise = torch.randn(shape) if sent is None else torch.tensor(np.asarray(sent)).reshape(shape)
    chunk = adapter.denoise(conditioning, noise[None].to(adapter.device, adapter.noise_spec.dtype))
    return adapter.postprocess(chunk, conditioning)[0].float().cpu().numpy().astype(np.float64)
