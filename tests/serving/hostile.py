"""What tests of hostile requests share."""

import base64
import io
from typing import Any

import httpx
from PIL import Image
from serving.clients import SMALL

MIB = 2**20


PLAIN = {"prompt": "a", **SMALL}


def picture(kind: str = "png", mode: str = "RGB", size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind, **options)
    return out.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def error_of(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def edit(url: str, files: Any = None, **fields: Any) -> httpx.Response:
    form = {"prompt": "a", "size": "64x48", **fields}
    return httpx.post(f"{url}/v1/images/edits", data=form, files=files or {"image": picture()}, timeout=60)


def many_fields(size: int) -> bytes:
    return b'{"prompt": "a"' + b"".join(b', "field%06d": 0' % i for i in range(size // 19)) + b"}"


def near_boundaries(size: int) -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    return head + b"\r\n-" * (size // 3) + b"\r\n--b--\r\n"
