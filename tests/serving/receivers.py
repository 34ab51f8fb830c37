"""A receiver of webhooks."""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from openai import OpenAI

SECRET = "whsec_" + "c2VjcmV0" * 4  # 24 bytes
_client = OpenAI(api_key="none")


class Received(NamedTuple):
    """A request that a receiver got."""

    path: str
    headers: dict[str, str]
    body: bytes

    def unwrapped(self, secret: str = SECRET) -> Any:
        """Return the event as OpenAI's client checks and reads it."""
        return _client.webhooks.unwrap(self.body, self.headers, secret=secret)


class Receiver:
    """Gets events, and answers them in turn with `statuses`, then with 200.

    `held` is set unless the receiver keeps those who send waiting.
    """

    def __init__(self, port: int, statuses: Sequence[int] = ()) -> None:
        self.received: queue.Queue[Received] = queue.Queue()
        self.released = threading.Event()
        self.released.set()
        answers = [*statuses]
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.received.put(Received(self.path, {**self.headers}, body))
                receiver.released.wait(30)
                self.send_response(answers.pop(0) if answers else 200)
                self.send_header("location", "/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                receiver.received.put(Received(self.path, {**self.headers}, b""))

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/events"

    def next(self) -> Received:
        """Wait for the next request."""
        return self.received.get(timeout=30)


@contextmanager
def receiving(*statuses: int, port: int = 0) -> Iterator[Receiver]:
    """Run a receiver."""
    receiver = Receiver(port, statuses)
    thread = threading.Thread(target=receiver.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.released.set()
        receiver.server.shutdown()
        receiver.server.server_close()
        thread.join()
