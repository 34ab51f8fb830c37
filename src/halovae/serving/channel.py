"""Rank 0's channel to the front. A dedicated thread receives attempts, and sends updates and files."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import queue
import secrets
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import zmq

_NAME_BYTES = 8  # of a digest
BEAT = 1.0  # seconds between signs of life
_NAP = 20  # milliseconds for which a message may wait to be sent
MOST_UNREAD = 64  # messages that each side of a connection between hosts holds
_PROBE = 2000  # milliseconds between two probes of a connection between hosts
_LOST = 10_000  # milliseconds without an answer after which it counts as lost
_CHUNK = 2**20  # bytes of a file that one message holds
_CHUNKS = 8  # that may wait to be sent


class Link(Protocol):
    """How rank 0 reaches the front.

    Attributes:
        endpoint: the socket's address.
        replica: the name of these ranks' group.
        since: when they started; later than any earlier ranks of the group.
        folder: where results are made: a folder of rank 0's host; "" if they go where the front wants them.
    """

    @property
    def endpoint(self) -> str: ...

    @property
    def replica(self) -> str: ...

    @property
    def since(self) -> float: ...

    @property
    def folder(self) -> str: ...

    def current_token(self) -> str:
        """The token of the front that runs now; "" if there is none yet."""

    def secure(self, socket: zmq.Socket[Any]) -> None:
        """Prepare a socket that will be connected to the front."""


class SocketFolder:
    """The folder of the socket between the front and rank 0, which nobody but this user may enter.

    It holds the socket and a token, which both sides show each other.

    Args:
        output: the output folder of the server.

    Attributes:
        endpoint: the socket's address. Its path may have at most 107 bytes on Linux.
        token: the token, where this process made the folder; else "".
        replica, since, folder: as of `Link`, for the only ranks of the front, on its host.

    Raises:
        OSError: another user made the folder, or may enter it.
    """

    def __init__(self, output: Path, front: bool = False) -> None:
        user = Path(tempfile.gettempdir()) / f"halovae-{os.getuid()}"
        self.replica, self.since, self.folder = "0", time.monotonic(), ""
        self._folder = user / hashlib.sha256(str(output).encode()).hexdigest()[: 2 * _NAME_BYTES]
        self.endpoint = f"ipc://{self._folder}/socket"
        for folder in (user, self._folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise PermissionError(f"{folder}: others may enter it; remove it, or set TMPDIR to another folder")
        self.token = secrets.token_hex(16) if front else ""
        if front:
            partial = self._folder / "token.partial"
            partial.write_text(self.token)
            partial.replace(self._folder / "token")

    def current_token(self) -> str:
        """The token of the front that runs now; "" if there is none yet."""
        try:
            return (self._folder / "token").read_text()
        except FileNotFoundError:
            return ""

    def knows(self, token: object) -> bool:
        """Whether a message that a front receives shows its token."""
        return isinstance(token, str) and hmac.compare_digest(token.encode(), self.token.encode())

    def secure(self, socket: zmq.Socket[Any]) -> None:
        """Do nothing: nobody else reaches the socket."""

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)


def notice_loss(socket: zmq.Socket[Any]) -> None:
    """Have a socket between hosts end connections over which nothing comes any more, so that rank 0 connects again."""
    socket.heartbeat_ivl, socket.heartbeat_timeout = _PROBE, _LOST


@dataclass(frozen=True)
class RemoteLink:
    """How a rank 0 that Ray has placed reaches the front, as `Link` says: by TCP, encrypted (CURVE).

    Attributes:
        token: the front's; rank 0 and the front show it to each other.
        key: the front's public key. Nobody else can read what is sent to it, or answer in its place.
    """

    endpoint: str
    token: str = field(repr=False)
    key: bytes = field(repr=False)
    replica: str
    since: float
    folder: str = ""

    def current_token(self) -> str:
        return self.token

    def secure(self, socket: zmq.Socket[Any]) -> None:
        socket.sndhwm = MOST_UNREAD
        notice_loss(socket)
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.curve_serverkey = self.key


class RankChannel:
    """Rank 0's end of the channel.

    Messages are JSON objects with a `kind`. The front sends `welcome` (a front has begun to use these ranks; attempts
    of an earlier front are void), `attempt` and `cancel`. Rank 0 sends `beat`, and for an attempt `started`,
    `progress`, `preview`, `denoised`, `file`, `finished`, `failed` and `cancelled`. On another host than the front's,
    the bytes of pictures follow an `attempt`, and those of a result's next piece follow a `file`.

    Args:
        link: how the front is reached; the output folder of a front on this host.

    Attributes:
        attempts: `attempt` messages, as the front sent them, with the bytes of pictures as `pictures`.
        cancelled: ids of unfinished attempts that the front has cancelled, or that are void.
        ready: whether jobs can be worked on, as beats report it.
    """

    def __init__(self, link: Path | Link) -> None:
        self.attempts: queue.Queue[dict[str, Any]] = queue.Queue()
        self.cancelled: set[str] = set()
        self.ready = False
        self._known: set[str] = set()
        self._welcomed = False
        self._outgoing: queue.SimpleQueue[tuple[dict[str, Any], bytes | None]] = queue.SimpleQueue()
        self._chunks = threading.Semaphore(_CHUNKS)
        self._link: Link = SocketFolder(link) if isinstance(link, Path) else link
        threading.Thread(target=self._run, daemon=True, name="channel to the front").start()

    def send(self, kind: str, attempt: str, **facts: Any) -> None:
        """Queue a message about an attempt, named by its id. `finished`, `failed` and `cancelled` end the attempt."""
        if kind in ("finished", "failed", "cancelled"):
            self._known.discard(attempt)
            self.cancelled.discard(attempt)
        self._outgoing.put(({"kind": kind, "attempt": attempt, **facts}, None))

    def place(self, path: str) -> Path:
        """Where to make a result that the front wants at `path`."""
        return Path(self._link.folder, Path(path).name) if self._link.folder else Path(path)

    def deliver(self, attempt: str, paths: Sequence[Path]) -> None:
        """Send an attempt's results to the front, if they are not where it wants them, and remove them here.

        Raises:
            OSError: a file cannot be read.
        """
        for index, path in enumerate(paths if self._link.folder else ()):
            with path.open("rb") as file:
                chunk, first = file.read(_CHUNK), True
                while chunk or first:
                    following = file.read(_CHUNK)
                    facts = {"index": index, "first": first, "last": not following}
                    self._chunks.acquire()  # a slow network must not fill the memory
                    self._outgoing.put(({"kind": "file", "attempt": attempt, **facts}, chunk))
                    chunk, first = following, False
            path.unlink()

    def _run(self) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        socket.setsockopt(zmq.LINGER, 0)
        self._link.secure(socket)
        socket.connect(self._link.endpoint)
        last = 0.0
        while True:
            if time.monotonic() - last > BEAT:
                last = time.monotonic()
                beat = {"kind": "beat", "ready": self.ready, "replica": self._link.replica, "since": self._link.since}
                self._outgoing.put(({**beat, "token": self._link.current_token()}, None))
            while not self._outgoing.empty():
                message, chunk = self._outgoing.get()
                if chunk is None:
                    socket.send(json.dumps(message).encode())
                else:
                    socket.send_multipart([json.dumps(message).encode(), chunk])
                    self._chunks.release()
            if socket.poll(_NAP):
                text, *pictures = socket.recv_multipart()
                self._receive({**json.loads(text), "pictures": pictures})

    def _receive(self, message: dict[str, Any]) -> None:
        if message["kind"] == "welcome":
            self._welcomed = hmac.compare_digest(message["token"], self._link.current_token())
            self.cancelled |= self._known
        elif not self._welcomed:
            logging.getLogger(__name__).error("a message of a process that is not this server's front was ignored")
        elif message["kind"] == "cancel":
            if message["attempt"] in self._known:
                self.cancelled.add(message["attempt"])
        else:
            self._known.add(message["attempt"])
            self.attempts.put(message)
