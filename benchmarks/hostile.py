"""Hostile requests against a live server with two ranks: what it answers, and whether it stays responsive.

    python benchmarks/hostile.py [--only NAME ...] [--output docs/benchmarks/hostile.md]

Each attack runs on its own, while another process asks `/livez` fifty times a second. The table shows the answers, the
99th percentile of `/livez`, and by how much the front's memory grew. No answer may be a 500, `/livez` must answer
within one second, and the front may take 300 MiB more at most.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import multiprocessing
import os
import resource
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import date
from multiprocessing.synchronize import Event
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
from live_server import Server
from PIL import Image
from rich.console import Console
from rich.table import Table

from halovae.pipelines import tiny

SMALL = {"prompt": "a", "size": "64x48", "num_frames": 5, "num_inference_steps": 1}
MIB = 2**20
MOST_SECONDS, MOST_MEMORY = 1.0, 300 * MIB
console = Console(stderr=True, width=160)
Attack = Callable[[str], Iterable[int]]  # takes the server's URL, and returns the status codes of the answers


def _post(url: str, body: bytes, kind: str = "application/json", path: str = "/v1/videos") -> int:
    return httpx.post(f"{url}{path}", content=body, headers={"Content-Type": kind}, timeout=120).status_code


def _json(url: str, **fields: Any) -> int:
    return _post(url, json.dumps({**SMALL, **fields}).encode())


def _picture(width: int, height: int, mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, height)).save(out, "png", **options)
    return out.getvalue()


def _data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def unknown_fields(url: str) -> list[int]:
    """6.6 MiB of unknown fields."""
    return [_post(url, json.dumps({**SMALL, **{f"field{index}": index for index in range(330_000)}}).encode())]


def many_references(url: str) -> list[int]:
    """9 MiB of empty lists in place of a picture."""
    return [_post(url, json.dumps({**SMALL, "input_reference": [[]] * 2_300_000}).encode())]


def large_data_url(url: str) -> list[int]:
    """A data: URL of 60 MiB."""
    return [_json(url, input_reference="data:image/png;base64," + "A" * (60 * MIB))]


def near_boundaries(url: str) -> list[int]:
    """10 MiB of a form in which nearly every byte could begin a boundary."""
    body = b"--x\r\nContent-Disposition: form-data; name=prompt\r\n\r\n" + b"\r\n--y" * (2 * MIB) + b"\r\n--x--\r\n"
    return [_post(url, body, "multipart/form-data; boundary=x")]


def deep_json(url: str) -> list[int]:
    """Lists within lists, and numbers of many digits."""
    bodies = b"[" * 500_000, b'{"seed": ' + b"9" * 500_000 + b"}", b'{"prompt": NaN}'
    return [_post(url, body) for body in bodies]


def palette_pictures(url: str) -> list[int]:
    """Eight at a time: pictures of 8 kB that unpack to 8000 x 8000 pixels with transparency."""
    data = _picture(8000, 8000, "P", transparency=0)
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda _: _json(url, input_reference=_data_url(data)), range(8)))


def largest_pictures(url: str) -> list[int]:
    """Eight at a time: the largest pictures that are allowed, with transparency."""
    data = _picture(4000, 4000, "P", transparency=0)
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda _: _json(url, input_reference=_data_url(data)), range(8)))


def many_pictures(url: str) -> list[int]:
    """Five pictures for a pipeline that takes one, and 6,382."""
    data = _data_url(_picture(2000, 2000))
    return [_json(url, input_reference=[data] * count) for count in (5, 40)] + [
        _json(url, input_reference=[_data_url(_picture(8, 8))] * 6382)
    ]


def broken_pictures(url: str) -> list[int]:
    """Pictures with broken parts: cut off, wrong EXIF data, a shape that no model takes."""
    out = io.BytesIO()
    Image.new("RGB", (64, 48)).save(out, "jpeg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")
    good, answers = out.getvalue(), []
    for at in range(0, len(good), 7):
        damaged = good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :]
        answers.append(_json(url, input_reference=_data_url(damaged)))
    for data in (b"", good[:200], _picture(60_000, 1), _picture(1, 60_000)):
        answers.append(_json(url, input_reference=_data_url(data)))
    return answers


def odd_text(url: str) -> list[int]:
    """Characters outside ASCII where base64 is expected, lone surrogates, NUL, charsets that do not exist."""
    answers = [_json(url, input_reference=f"data:image/png;base64,{text}") for text in ("é", "\ud800", "\0", "=" * 9)]
    answers += [_json(url, prompt=text) for text in ("\ud800", "a\0b", "\x1b[31m", "é" * 32_001)]
    for charset in ("undefined", "punycode", "idna", "utf-7", "x" * 200):
        body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\xfe\r\n--x--\r\n'
        answers.append(_post(url, body, f"multipart/form-data; boundary=x; charset={charset}"))
    return answers


def odd_urls(url: str) -> list[int]:
    """URLs that no client can parse, and addresses inside."""
    urls = [
        "http://8.8.8.8/\x01", "http://\uff11\uff12\uff17.0.0.1/", "http://[", "http://[::1]/", "http://127.0.0.1:6379/",
        "http://[64:ff9b::a9fe:a9fe]/", "http://[2002:7f00:1::]/", "http://[::127.0.0.1]/", "http://[fec0::1]/",
        "http://[::ffff:0:127.0.0.1]/", "http://192.0.0.192/", "http://168.63.129.16/", "http://169.254.169.254/",
        "gopher://a/", "http://a:99999/", "http://user:pass@localhost/", "http://0/", "http://2130706433/",
    ]  # fmt: skip
    return [_json(url, reference_url=one) for one in urls]


def long_videos(url: str) -> list[int]:
    """Numbers of frames that follow from seconds and frames per second, sizes with a line break, and other limits."""
    bodies: list[dict[str, Any]] = [
        {"seconds": 120, "fps": 120, "num_frames": None}, {"size": "64x48\n"}, {"n": 11}, {"num_frames": 1026},
        {"num_inference_steps": 1001}, {"size": "9999x9999"}, {"seconds": 1e300, "num_frames": None}, {"fps": 0},
    ]  # fmt: skip
    return [_json(url, **body) for body in bodies]


def simple_requests(url: str) -> list[int]:
    """What any web page may send without asking: JSON as text, another origin, another host."""
    body, answers = json.dumps(SMALL).encode(), [_post(url, json.dumps(SMALL).encode(), "text/plain")]
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
        answers.append(
            httpx.post(
                f"{url}/v1/videos", content=body, headers={"Content-Type": "application/json", **headers}
            ).status_code
        )
    return answers


def idle_sockets(url: str) -> list[int]:
    """10,000 connections that send nothing, or half a request."""
    target = httpx.URL(url)
    with ExitStack() as stack:
        for index in range(10_000):
            connection = stack.enter_context(socket.socket())
            connection.settimeout(5)
            with suppress(OSError):
                connection.connect((target.host, target.port or 80))
                if index % 2:
                    connection.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 500\r\n\r\n{")
        time.sleep(5)
    return []


def listeners(url: str) -> list[int]:
    """400 listeners for events, none of which reads, while jobs with prompts of 32 kB run."""
    target, answers = httpx.URL(url), []
    with ExitStack() as stack:
        for _ in range(400):
            connection = stack.enter_context(socket.create_connection((target.host, target.port or 80), timeout=5))
            with suppress(OSError):
                connection.sendall(f"GET /v1/jobs HTTP/1.1\r\nHost: {target.host}\r\n\r\n".encode())
        ids = []
        for index in range(12):
            body = {**SMALL, "prompt": "é" * 31_000, "seed": index, "input_reference": _data_url(_picture(64, 48))}
            answer = httpx.post(f"{url}/v1/videos", json=body, timeout=60)
            answers.append(answer.status_code)
            if answer.status_code == 200:
                ids.append(answer.json()["id"])
        deadline = time.monotonic() + 120
        while ids and time.monotonic() < deadline:
            ids = [one for one in ids if httpx.get(f"{url}/v1/videos/{one}").json()["status"] not in ENDED]
            time.sleep(0.2)
        answers += [504] * len(ids)
    return answers


def heads(url: str) -> list[int]:
    """HEAD requests, paths with control characters, and methods that are not there."""
    answers = [httpx.head(f"{url}{path}").status_code for path in ("/health", "/metrics", "/", "/v1/models")]
    answers += [httpx.get(f"{url}/v1/videos/%1b[31m{part}").status_code for part in ("x", "%00", "..%2f..%2fetc")]
    return [*answers, httpx.request("TRACE", f"{url}/v1/videos").status_code]


ENDED = ("completed", "failed")
ATTACKS: dict[str, Attack] = {
    attack.__name__.replace("_", " "): attack
    for attack in (
        unknown_fields, many_references, large_data_url, near_boundaries, deep_json, palette_pictures, largest_pictures,
        many_pictures, broken_pictures, odd_text, odd_urls, long_videos, simple_requests, idle_sockets, listeners,
        heads,
    )
}  # fmt: skip


def ask(url: str, stop: Event, waits: Any) -> None:
    """Ask `/livez` until told to stop, each time over a new connection, and send how long each answer took."""
    found = []
    while not stop.is_set():
        begin = time.monotonic()
        try:
            ok = httpx.get(f"{url}/livez", timeout=20).status_code == 200
        except httpx.HTTPError:
            ok = False
        found.append(time.monotonic() - begin if ok else float("inf"))
        time.sleep(0.02)
    waits.send(found)


class Memory(threading.Thread):
    """Samples a process's resident set."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._process, self.stop = psutil.Process(process), threading.Event()
        self.first = self.most = self._process.memory_info().rss
        self.start()

    def run(self) -> None:
        while not self.stop.wait(0.02):
            with suppress(psutil.NoSuchProcess):
                self.most = max(self.most, self._process.memory_info().rss)


def attacked(server: Server, attack: Attack) -> tuple[Counter[int], float, float, int]:
    """Run an attack. Return its answers, the 99th percentile and maximum of `/livez`, and the growth of memory."""
    assert server.process is not None
    receiver, sender = multiprocessing.Pipe(duplex=False)
    stop = multiprocessing.Event()
    asking = multiprocessing.Process(target=ask, args=(server.url, stop, sender), daemon=True)
    asking.start()
    memory = Memory(server.process.pid)
    time.sleep(0.5)
    answers = Counter(attack(server.url))
    time.sleep(0.5)
    stop.set()
    waits = receiver.recv()
    asking.join()
    memory.stop.set()
    percentile = statistics.quantiles(waits, n=100, method="inclusive")[98] if len(waits) > 1 else waits[0]
    return answers, percentile, max(waits), memory.most - memory.first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ATTACKS), help="some of the attacks")
    parser.add_argument("--output", type=Path, help="file for the figures")
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rows, missed = [("attack", "what", "answers", "/livez p99 (s)", "max (s)", "memory (MiB)", "")], []
    with TemporaryDirectory() as place:
        home = Path(place)
        tiny.make_model("wan2.1-i2v", home / "model")
        server = Server(home / "model", home / "output", ("--allow-url-inputs",)).start().wait()
        for name, attack in ATTACKS.items():
            if args.only and name not in args.only:
                continue
            answers, percentile, most, growth = attacked(server, attack)
            bad = answers[500] > 0 or percentile > MOST_SECONDS or growth > MOST_MEMORY or answers[504] > 0
            if bad:
                missed.append(name)
            shown = ", ".join(f"{code}: {count}" for code, count in sorted(answers.items()))
            what = (attack.__doc__ or "").strip()
            rows.append(
                (name, what, shown, f"{percentile:.3f}", f"{most:.3f}", f"{growth / MIB:+.0f}", "MISSED" if bad else "")
            )
            console.print(" | ".join(rows[-1]))
            server.wait()
        if server.stop():
            missed.append("the server's end")
    table = Table(title="hostile requests", title_justify="left")
    for column in rows[0]:
        table.add_column(column)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    text = (
        "# Hostile requests\n\n"
        f"`python benchmarks/hostile.py`, {date.today()}, {os.cpu_count()} cores: a tiny Wan2.1 (image to video) on "
        "two ranks.\n\n| " + " | ".join(rows[0]) + " |\n" + "| --- " * len(rows[0]) + "|\n"
        + "".join("| " + " | ".join(row) + " |\n" for row in rows[1:])
    )  # fmt: skip
    if args.output is not None:
        args.output.write_text(text)
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
