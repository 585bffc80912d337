"""Between learner and station: one message a chunk each way, over a websocket that the station dials.

The station greets with version and token; the learner answers, or refuses in one line. Pings of the
websocket are the heartbeat: either end is lost once it is silent for ``silence_s``.
"""

import contextlib
import hmac
import queue
import threading
import time
from typing import Any

from trimtab.adapters.errors import UserError, reason

try:
    from websockets.exceptions import ConnectionClosed, WebSocketException
    from websockets.sync.client import connect
    from websockets.sync.server import ServerConnection, serve

    from trimtab.adapters.remote.packing import pack, unpack
except ImportError:
    raise UserError(
        "--robot.type", "needs two more packages: uv pip install 'lerobot_policy_trimtab[remote]'"
    ) from None

VERSION = 3  # of the messages
GREETING_S = 10.0  # for a greeting
REDIAL_S = 0.5
BUSY = "another station is connected"


class Lost(Exception):
    """The other end is gone, silent or does not speak this language."""


def _receive(connection: Any, timeout: float | None = None) -> dict[str, Any]:
    """The next message.

    Raises:
        TimeoutError: there is none yet.
        Lost: there will be none.
    """
    try:
        message = unpack(connection.recv(timeout, decode=False))
    except ConnectionClosed as error:
        raise Lost(reason(error)) from None
    except (ValueError, TypeError) as error:
        connection.close()
        raise Lost(f"a message cannot be read: {reason(error)}") from None
    if not isinstance(message, dict):
        connection.close()
        raise Lost("a message is no dict")
    return message


def _send(connection: Any, message: dict[str, Any]) -> None:
    try:
        connection.send(pack(message))
    except ConnectionClosed as error:
        raise Lost(reason(error)) from None


class LearnerLink:
    """The learner's end: it listens, and talks to one station at a time. ``address`` is HOST:PORT."""

    def __init__(self, listen: str, token: str, silence_s: float, n_obs_steps: int) -> None:
        host, _, port = (listen or "127.0.0.1:0").rpartition(":")
        self._token, self._n_obs_steps = token, n_obs_steps
        self._arrived: queue.Queue[tuple[ServerConnection, dict[str, Any]]] = queue.Queue()
        self._connection: ServerConnection | None = None
        self._busy = threading.Lock()
        try:
            self._server = serve(
                self._greet,
                host,
                int(port),
                compression=None,
                max_size=None,
                ping_interval=min(0.5, silence_s / 4),
                ping_timeout=silence_s,
                close_timeout=1.0,
            )
        except OSError as error:
            raise UserError("--robot.listen", f"cannot listen on {host}:{port}: {reason(error)}") from error
        self.address = f"{host}:{self._server.socket.getsockname()[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _greet(self, connection: ServerConnection) -> None:
        """What the server does with each that dials, in a thread of its own, until it is gone."""
        try:
            hello = _receive(connection, GREETING_S)
            problem = self._problem(hello)
            if problem:
                return _send(connection, {"refused": problem})
            with self._busy:
                _send(connection, {"n_obs_steps": self._n_obs_steps})
                hello = _receive(connection)
                self._arrived.put((connection, hello))
                connection.recv_events_thread.join()
        except (Lost, TimeoutError):
            return

    def _problem(self, hello: dict[str, Any]) -> str:
        if hello.get("version") != VERSION:
            return (
                f"the learner speaks version {VERSION}, the station {hello.get('version')}: update the older"
            )
        if not hmac.compare_digest(str(hello.get("token")).encode(), self._token.encode()):
            return "the token is wrong: give --token= as the learner prints it"
        return BUSY if self._busy.locked() else ""

    def wait(self, timeout: float) -> dict[str, Any] | None:
        """What a station says of itself once there is one; ``None`` if there is none yet.

        Raises:
            UserError: what it says instead.
        """
        try:
            self._connection, hello = self._arrived.get(timeout=timeout)
        except queue.Empty:
            return None
        if "error" in hello:
            raise UserError(*hello["error"])
        return hello

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def send(self, message: dict[str, Any]) -> None:
        """Raises ``Lost``."""
        if self._connection is None:
            raise Lost("there is no station")
        try:
            _send(self._connection, message)
        except Lost:
            self._connection = None
            raise

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """Raises ``Lost``, or ``TimeoutError``."""
        if self._connection is None:
            raise Lost("there is no station")
        try:
            return _receive(self._connection, timeout)
        except Lost:
            self._connection = None
            raise

    def drop(self) -> None:
        """Part with a station that does not answer."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def close(self) -> None:
        self._server.shutdown()


class StationLink(contextlib.AbstractContextManager["StationLink"]):
    """The station's end. It dials at once, and again until somebody answers where it is to ``wait``.

    Raises:
        UserError: there is no learner at ``address``, or it refuses.
    """

    def __init__(self, address: str, token: str, silence_s: float, wait: bool = False) -> None:
        self._address, self._token, self._silence_s = address, token, silence_s
        self._connection: Any = None
        self._next: dict[str, Any] | None = None
        self.n_obs_steps, self._let_in = 1, False
        while not self.dial():
            if not wait:
                raise UserError("--connect", f"no learner answers at {address}")
            time.sleep(REDIAL_S)

    def dial(self) -> bool:
        """Whether the learner has let this station in.

        Raises:
            UserError: it refuses.
        """
        try:
            self._next = None
            self._connection = connect(
                f"ws://{self._address}",
                compression=None,
                max_size=None,
                open_timeout=GREETING_S,
                ping_interval=min(0.5, self._silence_s / 4),
                ping_timeout=self._silence_s,
                close_timeout=1.0,
            )
            _send(self._connection, {"version": VERSION, "token": self._token})
            answer = _receive(self._connection, GREETING_S)
        except (OSError, WebSocketException, Lost, TimeoutError):
            return False
        if self._let_in and answer.get("refused") == BUSY:
            return False  # with this very station: the learner has yet to notice that it was lost
        if "refused" in answer:
            raise UserError("--connect", str(answer["refused"]))
        self.n_obs_steps, self._let_in = int(answer["n_obs_steps"]), True
        return True

    def refuse(self, error: UserError) -> None:
        """Tell the learner why there is no robot."""
        with contextlib.suppress(Lost):
            self.send({"error": [error.option, error.message]})

    def send(self, message: dict[str, Any]) -> None:
        _send(self._connection, message)

    def receive(self) -> dict[str, Any]:
        message, self._next = self._next, None
        return message or _receive(self._connection)

    def withdrawn(self) -> bool:
        """Whether the learner has said something else meanwhile. Raises ``Lost``."""
        with contextlib.suppress(TimeoutError):
            self._next = self._next or _receive(self._connection, 0.0)
        return self._next is not None

    def __exit__(self, *exc: object) -> None:
        if self._connection is not None:
            self._connection.close()
