"""Describes the service under test: its address, the models that keys may ask for, and billing keys."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

SERVICE_VARIABLE = "LOADTEST_SERVICE"


class ServiceError(Exception):
    """Means that the environment names no service, or one that cannot be tested."""


@dataclass(frozen=True, slots=True)
class ModelAccess:
    """Names a model that a key may ask for."""

    tenant: str
    key: str
    name: str


@dataclass(frozen=True, slots=True)
class ServiceUnderTest:
    """Describes a service and who may use it.

    `billing_keys` have the scope billing-read, one for each tenant. `loud_models` are those of a noisy
    neighbour. With `store_url` the ledger itself can be read, so every request is compared and not only
    sums. `pid` is the service's process, if it runs on this machine.
    """

    url: str
    models: tuple[ModelAccess, ...]
    billing_keys: Mapping[str, str]
    loud_models: tuple[ModelAccess, ...] = ()
    store_url: str | None = None
    metrics_token: str | None = None
    pid: int | None = None
    description: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes a file that only this user can read, because keys are in it."""
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(self), file)


def read_service(path: Path) -> ServiceUnderTest:
    fields = json.loads(path.read_text())
    for name in ("models", "loud_models"):
        fields[name] = tuple(ModelAccess(**model) for model in fields[name])
    return ServiceUnderTest(**fields)


def find_service(environment: Mapping[str, str], url: str | None) -> ServiceUnderTest:
    """Reads the file that LOADTEST_SERVICE names, or asks a running service with the keys in `environment`.

    Raises ServiceError.
    """
    if path := environment.get(SERVICE_VARIABLE):
        return read_service(Path(path))
    if not url or not environment.get("LOADTEST_KEY"):
        raise ServiceError(
            "Nothing to drive: say `make loadtest SCENARIO=…`, or for a running service HOST=http://… "
            "and LOADTEST_KEY (see docs/loadtests.md)."
        )
    url = url.rstrip("/")
    billing_keys: dict[str, str] = {}
    models = _models(url, environment, "LOADTEST", billing_keys)
    loud = (
        _models(url, environment, "LOADTEST_LOUD", billing_keys) if "LOADTEST_LOUD_KEY" in environment else ()
    )
    if loud and loud[0].tenant == models[0].tenant:
        raise ServiceError("LOADTEST_LOUD_KEY must be another tenant's key than LOADTEST_KEY.")
    token = environment.get("BESPOKE_METRICS_TOKEN")
    return ServiceUnderTest(
        url, models, billing_keys, loud, metrics_token=token, description={"service": "running"}
    )


def _models(
    url: str, environment: Mapping[str, str], prefix: str, billing_keys: dict[str, str]
) -> tuple[ModelAccess, ...]:
    key = environment[f"{prefix}_KEY"]
    billing_key = environment.get(f"{prefix}_BILLING_KEY", key)
    tenant = str(_get(url, "/v1/organization/balance", billing_key)["tenant"])
    billing_keys[tenant] = billing_key
    available = [model["id"] for model in _get(url, "/v1/models", key)["data"]]
    # Bases and aliases. A name with @ is a version, which an alias already stands for.
    models = environment.get(f"{prefix}_MODELS", "").split(",") if environment.get(f"{prefix}_MODELS") else []
    models = models or [name for name in available if "@" not in name]
    if missing := sorted(set(models) - set(available)):
        raise ServiceError(f"The service has no model {', '.join(missing)} for {prefix}_KEY.")
    return tuple(ModelAccess(tenant, key, model) for model in models)


def _get(url: str, path: str, key: str) -> dict[str, Any]:
    try:
        response = httpx.get(f"{url}{path}", headers={"Authorization": f"Bearer {key}"}, timeout=30)
    except httpx.HTTPError as error:
        raise ServiceError(f"No service answers at {url}: {error}") from error
    if response.status_code != httpx.codes.OK:
        code = response.json().get("error", {}).get("message", "")
        raise ServiceError(f"GET {path}: {response.status_code} {code}")
    body: dict[str, Any] = response.json()
    return body
