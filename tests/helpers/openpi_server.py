"""A policy server that speaks openpi's protocol with openpi's own message format, for tests.

Behind it is a real (tiny, random) LeRobot DiffusionPolicy, run by LeRobot's own code. What it does wrong is
chosen by the path of the address: ws://127.0.0.1:PORT/ignores, /raises, and so on (``Mode``).
"""

import asyncio
import enum
import http
import logging
import threading
import time
import traceback
from pathlib import Path
from queue import Queue

import numpy as np
import torch
import websockets.asyncio.server
from openpi_client import msgpack_numpy

NAMES = {
    "observation/state": "observation.state",
    "observation/environment_state": "observation.environment_state",
}
API_KEY = "let-me-in"
FADES_AFTER = 60  # answers


class Mode(enum.StrEnum):
    honours = ""  # takes the noise out of the request and passes it on, as the DSRL forks do
    ignores = "ignores"  # as openpi's own server: draws its own
    blind = "blind"  # always uses the same noise
    unnamed = "unnamed"  # honours, but says nothing about its noise
    raises = "raises"
    fades = "fades"  # honours at first, and raises later
    silent = "silent"  # takes a request and never answers
    drops = "drops"  # honours, and closes the connection after each answer
    dies = "dies"  # closes the connection instead of answering
    leaves = "leaves"  # closes the connection at once
    nan = "nan"
    shape = "shape"  # a chunk without a time axis
    changes = "changes"  # a shorter chunk each time
    empty = "empty"  # an answer without actions
    garbage = "garbage"  # an answer that is not msgpack
    objects = "objects"  # an answer with an array of objects
    rounds = "rounds"  # honours, with rounding that differs each time
    key = "key"  # honours, but only with the API key
    late = "late"  # honours; a request that says "slow" is answered after half a second
    wide = "wide"  # honours, and adds two MiB to its answer
    libero = "libero"  # openpi's names, shapes and types for LIBERO, and a noise of its usual size
    aloha = "aloha"  # the same for ALOHA: nested names, channels first


class Policy:
    """The policy's function on one observation."""

    def __init__(self, folder: Path) -> None:
        from lerobot.configs import PreTrainedConfig
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
        from lerobot.policies.factory import make_pre_post_processors

        config = PreTrainedConfig.from_pretrained(folder)
        self.model = DiffusionPolicy.from_pretrained(folder, config=config).eval()
        self.before, self.after = make_pre_post_processors(config, pretrained_path=folder)
        self.shape = (1, config.horizon, config.action_feature.shape[0])
        self.draws = torch.Generator().manual_seed(0)  # its own: the tests seed that of the process

    @torch.no_grad()
    def infer(self, observation: dict, noise: np.ndarray | None = None) -> dict:
        given = {ours: torch.tensor(np.asarray(observation[name])).float() for name, ours in NAMES.items()}
        batch = self.before({key: value[None] for key, value in given.items()})
        batch = {key: batch[key][:, None] for key in given}  # a history of one
        noise = torch.randn(self.shape, generator=self.draws) if noise is None else torch.tensor(noise)
        actions = self.model.diffusion.generate_actions(batch, noise=noise.reshape(self.shape))
        return {"actions": self.after(actions)[0].numpy(), "state": observation["observation/state"]}

    def get_prefix_rep(self, observation: dict) -> list:
        total = np.sum(observation["observation/state"])
        tokens = np.stack([np.zeros(4), np.full(4, total)]).astype(np.float32)
        return [tokens[None], None]


def linear(mode: Mode, message: dict, noise: np.ndarray | None) -> dict:
    """Check a message of openpi's LIBERO or ALOHA clients; answer with what depends on all of it."""
    if mode is Mode.libero:
        images = {name: message[f"observation/{name}"] for name in ("image", "wrist_image")}
        state, side, dims = message["observation/state"], (224, 224, 3), 8
    else:
        images, state, side, dims = message["images"], message["state"], (3, 224, 224), 14
        assert list(images) == ["cam_high"], list(images)
    for image in images.values():
        assert image.dtype == np.uint8 and image.shape == side, (image.dtype, image.shape)
    assert state.shape == (dims,) and isinstance(message["prompt"], str)
    if noise is None:
        noise = np.random.default_rng().standard_normal((1, 10, 32))
    assert noise.shape == (1, 10, 32) and noise.dtype.kind == "f", noise.shape
    seen = sum(image.mean() / 255 for image in images.values()) + state.mean() + len(message["prompt"])
    return {"actions": noise[0, :, : dims - 1] + seen}


class Server:
    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.answers = self.faded = 0

    def answer(self, mode: Mode, message: dict) -> dict | list:
        self.answers += 1
        if message.get("method") == "get_prefix_rep" and mode is not Mode.ignores:
            return self.policy.get_prefix_rep(message["obs"])
        noise = message.pop("noise", None)
        if mode is Mode.raises:
            raise KeyError("observation/wrist_image")
        self.faded += mode is Mode.fades
        if self.faded > FADES_AFTER:
            self.faded = 0
            raise RuntimeError("out of memory")
        if mode is Mode.ignores:
            noise = None
        if mode in (Mode.libero, Mode.aloha):
            return linear(mode, message, noise)
        if mode is Mode.blind:
            noise = np.zeros(self.policy.shape, np.float32)
        answer = self.policy.infer(message, noise)
        actions = answer["actions"]
        if mode is Mode.nan:
            actions = np.full_like(actions, np.nan)
        if mode is Mode.shape:
            actions = actions[0]
        if mode is Mode.changes:
            actions = actions[: len(actions) - self.answers % 3]
        if mode is Mode.rounds:
            actions = actions + 1e-4 * np.random.default_rng(self.answers).standard_normal(actions.shape)
        answer["actions"] = actions.astype(np.float64)  # as openpi's NumPy transforms do
        return {} if mode is Mode.empty else answer

    async def handle(self, connection: websockets.asyncio.server.ServerConnection) -> None:
        mode = Mode(connection.request.path.strip("/"))
        if mode is Mode.leaves:
            return
        silent = mode in (Mode.unnamed, Mode.libero, Mode.aloha)
        metadata = {} if silent else {"noise_shape": list(self.policy.shape[1:])}
        await connection.send(msgpack_numpy.packb(metadata))
        while True:
            try:
                message = msgpack_numpy.unpackb(await connection.recv())
                started = time.monotonic()
                if mode is Mode.dies:
                    return
                if mode is Mode.silent:
                    await asyncio.sleep(3600)
                if mode is Mode.garbage:
                    await connection.send(b"\xc1 this is no msgpack")
                    continue
                if mode is Mode.late and message.pop("slow", False):
                    await asyncio.sleep(0.5)
                answer = self.answer(mode, message)
                if mode is Mode.wide:
                    answer["image"] = np.zeros((1024, 2048), np.uint8)
                if mode is Mode.objects:
                    answer["actions"] = {
                        b"__ndarray__": True, b"dtype": "|O", b"shape": [1], b"data": b"\0" * 8
                    }  # fmt: skip
                if isinstance(answer, dict):
                    answer["server_timing"] = {"infer_ms": 1e3 * (time.monotonic() - started)}
                await connection.send(msgpack_numpy.packb(answer))
                if mode is Mode.drops:
                    return
            except websockets.ConnectionClosed:
                return
            except Exception:
                await connection.send(traceback.format_exc())
                await connection.close(1011, "Internal server error")
                raise

    def admit(self, connection, request):
        """Refuse a client without the key where one is needed."""
        given = request.headers.get("Authorization")
        if request.path.strip("/") == Mode.key and given != f"Api-Key {API_KEY}":
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "no key\n")
        return None

    async def run(self, ports: Queue[int]) -> None:
        """Serve until the loop ends; its port goes to ``ports``. What a mode raises is not logged."""
        silent = logging.getLogger(__name__)
        silent.disabled = True
        options = {"compression": None, "max_size": None, "process_request": self.admit, "logger": silent}
        async with websockets.asyncio.server.serve(self.handle, "127.0.0.1", 0, **options) as server:
            ports.put(server.sockets[0].getsockname()[1])
            await server.serve_forever()


def serving(folder: Path) -> str:
    """Serve the policy in ``folder`` from a thread until the process ends; the address."""
    ports: Queue[int] = Queue()
    run = Server(Policy(folder)).run(ports)
    threading.Thread(target=asyncio.run, args=(run,), daemon=True).start()
    return f"ws://127.0.0.1:{ports.get(timeout=60)}"
