"""The client's side of openpi's policy server: msgpack with NumPy arrays over a websocket.

The messages are those of ``openpi_client``, byte for byte; that package itself cannot be used beside
LeRobot, for it wants numpy < 2. Nothing is ever pickled.
"""

from __future__ import annotations

import math
import os
import ssl
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np

from trimtab.adapters import UserError, policy_error
from trimtab.adapters.checkpoint.files import OPTION
from trimtab.adapters.errors import reason

try:
    import msgpack
    from websockets.exceptions import ConnectionClosed, WebSocketException
    from websockets.sync.client import connect
except ImportError:
    raise policy_error(
        "a policy server needs two more packages: pip install 'lerobot_policy_trimtab[remote]'"
    ) from None

API_KEY = "OPENPI_API_KEY"  # environment variable; sent as openpi's clients send theirs
OPEN_TIMEOUT = 10.0  # seconds to connect
CLOSE_TIMEOUT = 2.0  # seconds to say goodbye
REFUSED_KINDS = "OVc"  # NumPy kinds that do not travel: objects, records, complex numbers


def pack(message: Any) -> bytes:
    """Encode a message: msgpack, NumPy arrays and scalars as dicts of dtype, shape and bytes.

    ``ValueError`` or ``TypeError`` where it holds something else, such as an array of objects.
    """
    return msgpack.packb(message, default=_pack_numpy)


def unpack(data: bytes) -> Any:
    """Decode what ``pack`` or openpi encoded. Arrays are read-only views of ``data``.

    ``ValueError`` or ``TypeError`` where it is not msgpack, or an array is not what it says.
    """
    return msgpack.unpackb(data, object_hook=_unpack_numpy)


def _pack_numpy(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind in REFUSED_KINDS:
            raise ValueError(f"arrays of {value.dtype} are not sent")
        kind = value.dtype.str
        if isinstance(value, np.ndarray):
            return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": kind, b"shape": value.shape}
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": kind}
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def _unpack_numpy(value: dict) -> Any:
    if b"__ndarray__" in value:
        dtype, shape, data = _dtype(value[b"dtype"]), tuple(value[b"shape"]), value[b"data"]
        if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"{len(data)} bytes are no array {shape} of {dtype}")
        return np.ndarray(shape, dtype, data)
    if b"__npgeneric__" in value:
        return _dtype(value[b"dtype"]).type(value[b"data"])
    return value


def _dtype(name: Any) -> np.dtype:
    dtype = np.dtype(name) if isinstance(name, str) else None
    if dtype is None or dtype.kind in REFUSED_KINDS:
        raise ValueError(f"arrays of {name!r} are not accepted")
    return dtype


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
            raise policy_error(self._refused(error)) from None
        try:
            metadata = self._receive("describe itself")
        except ConnectionClosed as error:
            self.close()
            raise policy_error(f"{self.url} closed the connection at once ({reason(error)})") from None
        if not isinstance(metadata, dict):
            self.close()
            raise policy_error(f"{self.url} is not the address of an openpi policy server")
        self.metadata = metadata

    def _refused(self, error: Exception) -> str:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return f"{self.url} refused access (HTTP {status}); put the server's key into {API_KEY}"
        return f"{self.url} is not the address of an openpi policy server ({reason(error)})"

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
        raise AssertionError("unreachable")

    def _receive(self, what: str) -> Any:
        try:
            data = self._connection.recv(timeout=self.timeout)
            if isinstance(data, bytes):
                return unpack(data)
        except TimeoutError:
            self.close()  # a late answer would be taken for that to the next request
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
