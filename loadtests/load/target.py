"""What is driven: a service, whose keys ask for which models, and who may read the usage."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

TARGET_VARIABLE = "LOADTEST_TARGET"


class TargetError(Exception):
    """The environment does not say what to drive, or what it says is not there."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A model that a key may ask for."""

    tenant: str
    key: str
    model: str


@dataclass(frozen=True, slots=True)
class Target:
    """`readers` are keys with the scope billing-read, by tenant; `loud` is what a noisy neighbour asks for.

    With `store_url` the ledger itself can be read: then every request is compared, not only sums.
    `service_pid` is the service's process, if it runs on this machine.
    """

    url: str
    offers: tuple[Offer, ...]
    readers: Mapping[str, str]
    loud: tuple[Offer, ...] = ()
    store_url: str | None = None
    metrics_token: str | None = None
    service_pid: int | None = None
    described: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Keys are in it: for this user only."""
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(self), file)


def read_target(path: Path) -> Target:
    said = json.loads(path.read_text())
    for name in ("offers", "loud"):
        said[name] = tuple(Offer(**offer) for offer in said[name])
    return Target(**said)


def target_of(environment: Mapping[str, str], url: str | None) -> Target:
    """From the file that LOADTEST_TARGET names, or for a running service from its keys.

    Raises TargetError.
    """
    if path := environment.get(TARGET_VARIABLE):
        return read_target(Path(path))
    if not url or not environment.get("LOADTEST_KEY"):
        raise TargetError(
            "Nothing to drive: say `make loadtest SCENARIO=…`, or for a running service HOST=http://… "
            "and LOADTEST_KEY (see docs/loadtests.md)."
        )
    url = url.rstrip("/")
    readers: dict[str, str] = {}
    offers = _offers(url, environment, "LOADTEST", readers)
    loud = _offers(url, environment, "LOADTEST_LOUD", readers) if "LOADTEST_LOUD_KEY" in environment else ()
    if loud and loud[0].tenant == offers[0].tenant:
        raise TargetError("LOADTEST_LOUD_KEY must be another tenant's key than LOADTEST_KEY.")
    token = environment.get("BESPOKE_METRICS_TOKEN")
    return Target(url, offers, readers, loud, metrics_token=token, described={"service": "running"})


def _offers(
    url: str, environment: Mapping[str, str], prefix: str, readers: dict[str, str]
) -> tuple[Offer, ...]:
    key = environment[f"{prefix}_KEY"]
    reader = environment.get(f"{prefix}_BILLING_KEY", key)
    tenant = str(_get(url, "/v1/organization/balance", reader)["tenant"])
    readers[tenant] = reader
    served = [model["id"] for model in _get(url, "/v1/models", key)["data"]]
    # An alias, or a base; not also the version that the alias means.
    models = environment.get(f"{prefix}_MODELS", "").split(",") if environment.get(f"{prefix}_MODELS") else []
    models = models or [name for name in served if "@" not in name]
    if missing := sorted(set(models) - set(served)):
        raise TargetError(f"The service has no model {', '.join(missing)} for {prefix}_KEY.")
    return tuple(Offer(tenant, key, model) for model in models)


def _get(url: str, path: str, key: str) -> dict[str, Any]:
    try:
        answer = httpx.get(f"{url}{path}", headers={"Authorization": f"Bearer {key}"}, timeout=30)
    except httpx.HTTPError as error:
        raise TargetError(f"No service answers at {url}: {error}") from error
    if answer.status_code != httpx.codes.OK:
        code = answer.json().get("error", {}).get("message", "")
        raise TargetError(f"GET {path}: {answer.status_code} {code}")
    body: dict[str, Any] = answer.json()
    return body
