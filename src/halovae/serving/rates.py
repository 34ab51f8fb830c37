"""How many submissions a caller may make in a time."""

from __future__ import annotations

import ipaddress
import math
import time

from limits import parse_many
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from halovae.serving.errors import ApiError

_ADDRESSES = 64  # bits of an IPv6 address that name a client: it may use all addresses that share them


class Rates:
    """Counts the submissions of each key, or of each address where there are no keys.

    Args:
        rate: how many submissions in which time, such as "30/minute" or "100 per 2 hours".

    Raises:
        ValueError: the rate is something else.
    """

    def __init__(self, rate: str) -> None:
        try:
            (self._rate,) = parse_many(rate)
        except ValueError as error:
            raise ValueError("expected one number and a time, such as 30/minute") from error
        if self._rate.amount < 1:
            raise ValueError("expected a number of 1 or more")
        self._text = rate
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def take(self, key: str | None, address: str) -> dict[str, str]:
        """Count a submission, and return the headers that say how many are left.

        Raises:
            ApiError: there were too many.
        """
        caller = ("key", key) if key is not None else ("address", _network(address))
        taken = self._limiter.hit(self._rate, *caller)
        window = self._limiter.get_window_stats(self._rate, *caller)
        seconds = max(1, math.ceil(window.reset_time - time.time()))
        headers = {
            "x-ratelimit-limit-requests": str(self._rate.amount),
            "x-ratelimit-remaining-requests": str(max(0, window.remaining)),
            "x-ratelimit-reset-requests": f"{seconds}s",
        }
        if not taken:
            whose = f"the key {key}" if key is not None else "this address"
            message = f"{whose} may submit {self._text} (--rate-limit): try again in {seconds} s"
            headers["Retry-After"] = str(seconds)
            raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)
        return headers


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a proxy may name clients otherwise
        return address
    bits = _ADDRESSES if parsed.version == 6 else 32
    return str(ipaddress.ip_network((parsed, bits), strict=False))
