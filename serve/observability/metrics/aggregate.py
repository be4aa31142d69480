"""Merges the metrics of all gateways, so that each of them answers a scrape for all.

Each series of a gateway has the label `gateway`. The gateway that is scraped asks all others for their series
and merges them. So no counter goes back when a gateway dies: its series end, and queries sum the others.
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
    """Holds one gateway's metrics in Prometheus' text format, with its name in each series."""

    gateway: str
    text: bytes


class GatewayPeers(Protocol):
    """Reaches all gateways of the service from one of them."""

    @property
    def name(self) -> str:
        """This gateway's own name, its label."""

    @property
    def wanted(self) -> int:
        """The number of gateways that there should be."""

    async def expositions(self) -> list[Exposition | None]:
        """Returns each gateway's exposition, also this one's; None for one that does not answer in time."""


def labelled(text: bytes, gateway: str) -> bytes:
    """Puts the label `gateway` first in each series of `text`. Comments begin with no word character."""
    mark = b'{gateway="' + gateway.encode() + b'"'
    return _BARE.sub(rb"\1" + mark + b"} ", _LABELLED.sub(rb"\1" + mark + b",", text))


def merge(texts: Iterable[bytes]) -> bytes:
    """Merges expositions into a valid one: a family's series stand together below one HELP and TYPE."""
    families: dict[bytes, list[bytes]] = {}
    for text in texts:
        # A label's value holds no newline that is not escaped, so this is a family's first line.
        for part in (b"\n" + text).split(b"\n" + _HELP)[1:]:
            name, _, _ = part.partition(b" ")
            help_text, type_line, *series = part.rstrip(b"\n").split(b"\n")
            families.setdefault(name, [_HELP + help_text, type_line]).extend(series)
    return b"".join(b"\n".join(lines) + b"\n" for lines in families.values())


class AggregateCollector(Collector):
    """Counts gateways and engine replicas. `engines` holds, by base, how many replicas have answered."""

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
