"""What a machine takes for each kind of work: the numbers that turn a cost into seconds, and the files they are in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from halovae.distributed.transport import Link
from halovae.planning.cost import EXCHANGE, GATHER, Cost, Work

# The rates of kinds that a calibration does not know.
OTHER = "other"


@dataclass(frozen=True)
class Rates:
    """Seconds for each unit of work of one kind; see `Work`."""

    calls: float = 0
    flops: float = 0
    bytes: float = 0
    weights: float = 0

    def seconds(self, work: Work) -> float:
        return sum(rate * getattr(work, name) for name, rate in vars(self).items())


@dataclass(frozen=True)
class Calibration:
    """What one kind of device takes, among so many others.

    Attributes:
        name: the device's.
        device: its kind.
        origin: "measured", or what an estimate was made from.
        alone: the rates, by kind of operator, of a rank that computes while the others are idle.
        together: those of a rank while all compute.
        exchange: of ranks that swap borders, by the class of their pair: "host" within one, "hosts" between two.
        gather: the same where a rank collects what all have; bytes are those of the others.
        host_copy: from the device to the host.
    """

    name: str
    device: str
    origin: str
    alone: Mapping[str, Rates]
    together: Mapping[str, Rates]
    exchange: Mapping[str, Link]
    gather: Mapping[str, Link]
    host_copy: Link

    def links(self, hosts: bool) -> dict[str, Link]:
        """What exchanges and gathers take on one host, or on several."""
        pair = "hosts" if hosts and "hosts" in self.exchange else "host"
        return {EXCHANGE: self.exchange[pair], GATHER: self.gather[pair]}

    def seconds(self, cost: Cost, ranks: int, hosts: bool = False) -> dict[str, float]:
        """What a decode of this cost takes on `ranks` ranks, on one host or several, by layer."""
        rates = self.alone if ranks == 1 else self.together
        links = self.links(hosts)
        found: dict[str, float] = {}
        for (layer, kind), work in cost.work.items():
            if kind in links:
                seconds = links[kind].seconds(work.bytes, work.calls)
            else:
                seconds = rates.get(kind, rates[OTHER]).seconds(work)
            found[layer] = found.get(layer, 0) + seconds
        return found

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what `as_json` wrote.

        Raises:
            ValueError: it is something else; says what is wrong.
        """
        try:
            data = json.loads(text)
            if set(data) != {one.name for one in fields(cls)}:
                raise ValueError(f"has the fields {', '.join(sorted(data))}")
            for rates in (data["alone"], data["together"]):
                rates.update({kind: Rates(**_numbers(one)) for kind, one in rates.items()})
                rates[OTHER]
            for links in (data["exchange"], data["gather"]):
                links.update({pair: Link(**_numbers(one)) for pair, one in links.items()})
                links["host"]
            return cls(**{**data, "host_copy": Link(**_numbers(data["host_copy"]))})
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"no calibration: {error}") from error


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and value >= 0):
            raise ValueError(f"{name} is {value!r}, expected a number >= 0")
    return values


def shipped() -> dict[str, Path]:
    """The calibrations that come with the package, by name."""
    folder = Path(str(files("halovae.planning") / "devices"))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def read(source: str) -> Calibration:
    """A calibration from a file, or one that ships with the package, by its name.

    Raises:
        ValueError: there is none; says which ship.
    """
    path = shipped().get(source.removesuffix(".json"), Path(source))
    if not path.is_file():
        raise ValueError(f"calibration {source!r}: neither a file nor one of {', '.join(shipped())}")
    try:
        return Calibration.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"calibration {path}: {error}") from error
