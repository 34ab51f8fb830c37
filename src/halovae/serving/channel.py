"""Rank 0's channel to the front. A dedicated thread receives attempts and sends updates."""

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
from pathlib import Path
from typing import Any

import zmq

_NAME_BYTES = 8  # of a digest
BEAT = 1.0  # seconds between signs of life
_NAP = 20  # milliseconds for which a message may wait to be sent


class SocketFolder:
    """The folder of the socket between the front and rank 0, which nobody but this user may enter.

    It holds the socket and a token, which both sides show each other.

    Args:
        output: the output folder of the server.

    Attributes:
        endpoint: the socket's address. Its path may have at most 107 bytes on Linux.
        token: the token, where this process made the folder; else "".

    Raises:
        OSError: another user made the folder, or may enter it.
    """

    def __init__(self, output: Path, front: bool = False) -> None:
        user = Path(tempfile.gettempdir()) / f"halovae-{os.getuid()}"
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

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)


class RankChannel:
    """Rank 0's end of the channel.

    Messages are JSON objects with a `kind`. The front sends `welcome` (a front has begun to use these ranks; attempts
    of an earlier front are void), `attempt` and `cancel`. Rank 0 sends `beat`, and for an attempt `started`,
    `progress`, `preview`, `denoised`, `finished`, `failed` and `cancelled`.

    Attributes:
        attempts: `attempt` messages, as the front sent them.
        cancelled: ids of unfinished attempts that the front has cancelled, or that are void.
        ready: whether jobs can be worked on, as beats report it.
    """

    def __init__(self, output: Path) -> None:
        self.attempts: queue.Queue[dict[str, Any]] = queue.Queue()
        self.cancelled: set[str] = set()
        self.ready = False
        self._known: set[str] = set()
        self._welcomed, self._since = False, time.monotonic()
        self._outgoing: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._folder = SocketFolder(output)
        threading.Thread(target=self._run, daemon=True, name="channel to the front").start()

    def send(self, kind: str, attempt: str, **facts: Any) -> None:
        """Queue a message about an attempt, named by its id. `finished`, `failed` and `cancelled` end the attempt."""
        if kind in ("finished", "failed", "cancelled"):
            self._known.discard(attempt)
            self.cancelled.discard(attempt)
        self._outgoing.put({"kind": kind, "attempt": attempt, **facts})

    def _run(self) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self._folder.endpoint)
        last = 0.0
        while True:
            if time.monotonic() - last > BEAT:
                last = time.monotonic()
                self._outgoing.put(
                    {"kind": "beat", "ready": self.ready, "since": self._since, "token": self._folder.current_token()}
                )
            while not self._outgoing.empty():
                socket.send(json.dumps(self._outgoing.get()).encode())
            if socket.poll(_NAP):
                self._receive(json.loads(socket.recv()))

    def _receive(self, message: dict[str, Any]) -> None:
        if message["kind"] == "welcome":
            self._welcomed = hmac.compare_digest(message["token"], self._folder.current_token())
            self.cancelled |= self._known
        elif not self._welcomed:
            logging.getLogger(__name__).error("a message of a process that is not this server's front was ignored")
        elif message["kind"] == "cancel":
            if message["attempt"] in self._known:
                self.cancelled.add(message["attempt"])
        else:
            self._known.add(message["attempt"])
            self.attempts.put(message)
