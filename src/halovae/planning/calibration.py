"""Calibrations: the rates of a machine that turn a cost into seconds, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from halovae.distributed.transport import Link
from halovae.planning.cost import EXCHANGE, GATHER, Cost, Work

# The key of the rates for kinds that a calibration does not know.
OTHER = "other"


@dataclass(frozen=True)
class Rates:
    """Seconds per unit of one kind of work; see `Work`."""

    calls: float = 0
    flops: float = 0
    bytes: float = 0
    weights: float = 0

    def seconds(self, work: Work) -> float:
        return sum(rate * getattr(work, name) for name, rate in vars(self).items())


@dataclass(frozen=True)
class Calibration:
    """The rates of one kind of device.

    Attributes:
        name: the device's name.
        device: its kind.
        origin: "measured", or what an estimate was made from.
        single: the rates, by kind of operator, of a rank that computes while the others are idle.
        together: the rates of a rank while all compute.
        exchange: the links of ranks that swap borders: "host" for two ranks of one host, "hosts" for ranks of two.
        gather: the same for a rank that collects what all ranks have; its bytes are those of the others.
        host: the link between the device and the host's pinned memory.
    """

    name: str
    device: str
    origin: str
    single: Mapping[str, Rates]
    together: Mapping[str, Rates]
    exchange: Mapping[str, Link]
    gather: Mapping[str, Link]
    host: Link = Link(20e-6, 1 / 20e9)  # of the order of PCIe 4.0 with 16 lanes

    def links(self, hosts: bool) -> dict[str, Link]:
        """Return the links of exchanges and gathers, on one host or on several."""
        pair = "hosts" if hosts and "hosts" in self.exchange else "host"
        return {EXCHANGE: self.exchange[pair], GATHER: self.gather[pair]}

    def seconds(self, cost: Cost, ranks: int, hosts: bool = False) -> dict[str, float]:
        """Return the seconds by layer of a decode of this cost on `ranks` ranks, on one host or several."""
        rates = self.single if ranks == 1 else self.together
        links = self.links(hosts)
        by_layer: dict[str, float] = {}
        for (layer, kind), work in cost.work.items():
            if kind in links:
                seconds = links[kind].seconds(work.bytes, work.calls)
            else:
                seconds = rates.get(kind, rates[OTHER]).seconds(work)
            by_layer[layer] = by_layer.get(layer, 0) + seconds
        return by_layer

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what `as_json` wrote.

        Raises:
            ValueError: the text is something else; the message says what is wrong.
        """
        try:
            data = json.loads(text)
            data.setdefault("host", asdict(cls.host))  # earlier files have none
            if set(data) != {one.name for one in fields(cls)}:
                raise ValueError(f"has the fields {', '.join(sorted(data))}")
            for rates in (data["single"], data["together"]):
                rates.update({kind: Rates(**_numbers(one)) for kind, one in rates.items()})
                rates[OTHER]
            for links in (data["exchange"], data["gather"]):
                links.update({pair: Link(**_numbers(one)) for pair, one in links.items()})
                links["host"]
            data["host"] = Link(**_numbers(data["host"]))
            return cls(**data)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not a calibration: {error}") from error


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and value >= 0):
            raise ValueError(f"{name} is {value!r}, expected a number >= 0")
    return values


def shipped() -> dict[str, Path]:
    """Return the files of the calibrations that ship with the package, by name."""
    folder = Path(str(files("halovae.planning") / "devices"))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def read(source: str) -> Calibration:
    """Read a calibration from a file, or one that ships with the package, by its name.

    Raises:
        ValueError: there is none; the message lists those that ship.
    """
    path = shipped().get(source.removesuffix(".json"), Path(source))
    if not path.is_file():
        raise ValueError(f"calibration {source!r}: neither a file nor one of {', '.join(shipped())}")
    try:
        return Calibration.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"calibration {path}: {error}") from error
