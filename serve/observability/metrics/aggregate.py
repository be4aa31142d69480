"""One view of all gateways, whichever of them is asked.

Each series of a gateway bears the label `gateway`. The one that is scraped asks all others for theirs and
merges them, so a counter never goes back when a gateway dies: its series end, and queries sum the others.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_HELP = b"# HELP "
_LABELLED, _BARE = re.compile(rb"^(\w+)\{", re.MULTILINE), re.compile(rb"^(\w+) ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Exposition:
    """What one gateway says in Prometheus' text format, its name in each series."""

    gateway: str
    text: bytes


class GatewayPeers(Protocol):
    """All gateways of the service, as one of them sees them."""

    @property
    def name(self) -> str:
        """This one's own: its label."""

    @property
    def wanted(self) -> int:
        """How many there should be."""

    async def expositions(self) -> list[Exposition | None]:
        """What each says, this one too; None for one that does not answer. Takes seconds at most."""


def labelled(text: bytes, gateway: str) -> bytes:
    """`text` with the label `gateway`, first of all, in each series. Comments begin with no word."""
    mark = b'{gateway="' + gateway.encode() + b'"'
    return _BARE.sub(rb"\1" + mark + b"} ", _LABELLED.sub(rb"\1" + mark + b",", text))


def merge(texts: Iterable[bytes]) -> bytes:
    """One valid exposition: what several say of a family stands together, below one HELP and TYPE."""
    families: dict[bytes, list[bytes]] = {}
    for text in texts:
        # A label's value holds no newline that is not escaped, so this is a family's first line.
        for part in (b"\n" + text).split(b"\n" + _HELP)[1:]:
            name, _, _ = part.partition(b" ")
            described, typed, *series = part.rstrip(b"\n").split(b"\n")
            families.setdefault(name, [_HELP + described, typed]).extend(series)
    return b"".join(b"\n".join(lines) + b"\n" for lines in families.values())


class AggregateCollector(Collector):
    """`engines` says for each base how many of its replicas have answered."""

    def __init__(self, gateways: int, answering: int, engines: Mapping[str, int]) -> None:
        self._gateways, self._answering, self._engines = gateways, answering, engines

    def collect(self) -> Iterable[Metric]:
        gateways = GaugeMetricFamily("bespoke_gateways", "Gateways that there are or should be.")
        gateways.add_metric([], self._gateways)
        answering = GaugeMetricFamily("bespoke_gateways_answering", "Those whose figures are here.")
        answering.add_metric([], self._answering)
        replicas = GaugeMetricFamily(
            "bespoke_engine_replicas", "Engine replicas that have answered.", labels=["base"]
        )
        for base, count in self._engines.items():
            replicas.add_metric([base], count)
        return [gateways, answering, replicas]


def render_aggregate(gateways: int, answering: int, engines: Mapping[str, int]) -> bytes:
    registry = CollectorRegistry()
    registry.register(AggregateCollector(gateways, answering, engines))
    return generate_latest(registry)
