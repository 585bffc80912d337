"""The client's side of openpi's policy server: msgpack with NumPy arrays over a websocket, and images.

The messages are those of ``openpi_client``, byte for byte; that package itself cannot be used beside
LeRobot, for it wants numpy < 2. Nothing is ever pickled.
"""

import os
import ssl
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.adapters import UserError, policy_error
from trimtab.adapters.checkpoint.files import OPTION
from trimtab.adapters.config import RemoteConfig
from trimtab.adapters.errors import reason

try:
    from websockets.exceptions import ConnectionClosed, WebSocketException
    from websockets.sync.client import connect

    from trimtab.adapters.remote.packing import pack, unpack
except ImportError:
    raise policy_error(
        "a policy server needs two more packages: pip install 'lerobot_policy_trimtab[remote]'"
    ) from None

API_KEY = "OPENPI_API_KEY"  # environment variable; sent as openpi's clients send theirs
OPEN_TIMEOUT = 10.0  # seconds to connect
CLOSE_TIMEOUT = 2.0  # seconds to say goodbye


class ServerError(UserError):
    """The server answered a request with its own traceback."""


class PolicyServer:
    """A connection to an openpi policy server (``ws://host:port``), opened at once and again where it drops.

    An answer has ``timeout`` seconds. What goes wrong, here and in ``request``, is a ``UserError``.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url, timeout
        self._stack = ExitStack()
        self._connection: Any = None
        self.metadata: dict[str, Any] = {}  # what the server says about itself
        self._open()

    def _open(self) -> None:
        key = os.environ.get(API_KEY)
        try:
            # Entered as a context: called plainly, websockets 17 warns.
            self._connection = self._stack.enter_context(
                connect(
                    self.url,
                    compression=None,
                    max_size=None,
                    open_timeout=OPEN_TIMEOUT,
                    close_timeout=CLOSE_TIMEOUT,
                    # It cannot answer a ping while it infers or compiles; the answer has its own timeout.
                    ping_interval=None,
                    additional_headers={"Authorization": f"Api-Key {key}"} if key else None,
                )
            )
        except TimeoutError:
            raise policy_error(f"{self.url} did not answer within {OPEN_TIMEOUT:g} s") from None
        except ssl.SSLError as error:
            raise policy_error(f"no secure connection to {self.url} ({reason(error)})") from None
        except OSError as error:
            raise policy_error(
                f"nobody listens at {self.url} ({reason(error)}); start openpi's server first "
                "(scripts/serve_policy.py) or name its address"
            ) from None
        except (WebSocketException, EOFError, ValueError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403):
                why = f"{self.url} refused access (HTTP {status}); put the server's key into {API_KEY}"
            else:
                why = f"{self.url} is not the address of an openpi policy server ({reason(error)})"
            raise policy_error(why) from None
        try:
            metadata = self._receive("describe itself")
        except ConnectionClosed as error:
            self.close()
            raise policy_error(f"{self.url} closed the connection at once ({reason(error)})") from None
        if not isinstance(metadata, dict):
            self.close()
            raise policy_error(f"{self.url} is not the address of an openpi policy server")
        self.metadata = metadata

    def request(self, message: dict[str, Any]) -> Any:
        """Send a message and return the answer; after a dropped connection, once more.

        The server keeps nothing between requests, so that sending one twice does no harm.
        """
        data = pack(message)
        for last in (False, True):
            try:
                if self._connection is None:
                    self._open()
                self._connection.send(data)
                return self._receive("answer")
            except ConnectionClosed as error:
                self.close()
                if last:
                    raise policy_error(f"{self.url} dropped the connection twice ({reason(error)})") from None
            except BaseException:  # interrupted: the answer would be taken for that to the next request
                self.close()
                raise
        raise AssertionError("unreachable")

    def _receive(self, what: str) -> Any:
        try:
            data = self._connection.recv(timeout=self.timeout)
            if isinstance(data, bytes):
                return unpack(data)
        except TimeoutError:
            self.close()
            raise policy_error(
                f"{self.url} did not {what} within {self.timeout:g} s; raise --policy.remote.timeout if it "
                "is still compiling"
            ) from None
        except (UserError, ConnectionClosed):
            raise
        except Exception as error:  # msgpack has an exception for each way of being cut short
            self.close()
            raise policy_error(
                f"{self.url} sent what is not openpi's message format ({reason(error)})"
            ) from None
        self.close()
        raise ServerError(
            OPTION, f"the policy server at {self.url} failed: {reason(Exception(data), last=True)}"
        )

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        self._connection = None
        with suppress(Exception):
            self._stack.close()


def is_image(key: str) -> bool:
    """Whether an observation of this name is an image."""
    return key.startswith("observation.image")


def sent_images(options: RemoteConfig, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as the server's: (B, side, side, 3) uint8, or channels first."""
    if images.is_floating_point():
        images = (images * 255).round().clamp(0, 255)
    arrays = images.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    if options.image_size:
        arrays = np.stack([resize_with_pad(image, options.image_size) for image in arrays])
    if options.channels_first:
        arrays = arrays.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(arrays))


def describe(message: dict[str, Any], prefix: str = "") -> list[str]:
    """The names in a message, with the shapes of arrays."""
    names = []
    for key, value in message.items():
        if isinstance(value, dict):
            names += describe(value, f"{prefix}{key}.")
        else:
            names.append(f"{prefix}{key}" + (f" {value.shape}" if isinstance(value, np.ndarray) else ""))
    return names


def resize_with_pad(image: np.ndarray, side: int) -> np.ndarray:
    """Fit an image (H, W, 3) uint8 into (side, side, 3), centred on black, as openpi's clients do."""
    from PIL import Image

    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return image
    ratio = max(width / side, height / side)
    inner = int(height / ratio), int(width / ratio)
    canvas = np.zeros((side, side, 3), np.uint8)
    top, left = (side - inner[0]) // 2, (side - inner[1]) // 2
    small = Image.fromarray(image).resize(inner[::-1], Image.Resampling.BILINEAR)
    canvas[top : top + inner[0], left : left + inner[1]] = np.asarray(small)
    return canvas
