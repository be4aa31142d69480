"""The OpenAPI document is accurate: schemathesis finds no 5xx and no answer that it does not describe.

schemathesis.readthedocs.io. Bounded: a few examples an operation, each with a time-out.
"""

import tempfile
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from serve.deployment.app import build_app
from serve.settings import Settings
from serve.tenants import SCOPES
from tests.support.constants import NOON, TENANTS
from tests.support.live_service import LiveService

pytestmark = pytest.mark.slow

# Not among them: that whatever the schema allows is accepted. A model's name, a limit of the installation
# or a schema in a schema are beyond what the document can say; their refusals are described answers.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


def document() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home:
        return build_app(Settings(home=Path(home)), {}).openapi()


@pytest.fixture(scope="module")
def keys(live: LiveService) -> dict[str, str]:
    """A key that may do everything for its tenant, and one of the platform's."""
    _, tenant = live.tenants.create_key(TENANTS[0], at=NOON, scopes=frozenset(SCOPES))
    _, platform = live.tenants.platform_keys.create("schemathesis", at=NOON)
    return {"tenant": tenant, "platform": platform}


schema = schemathesis.openapi.from_dict(document())
bounded = hypothesis.settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)


@schema.exclude(path_regex="^/admin").parametrize()
@bounded
def test_tenants_routes_answer_as_documented(
    live: LiveService, keys: dict[str, str], case: schemathesis.Case
) -> None:
    validate(live, case, keys["tenant"])


@schema.include(path_regex="^/admin").parametrize()
@bounded
def test_admin_routes_answer_as_documented(
    live: LiveService, keys: dict[str, str], case: schemathesis.Case
) -> None:
    validate(live, case, keys["platform"])


@schema.exclude(path_regex="^/(healthz|readyz|metrics)").parametrize()
@hypothesis.settings(parent=bounded, max_examples=1)
def test_no_route_answers_without_a_key(live: LiveService, case: schemathesis.Case) -> None:
    answer = case.call(base_url=live.url, headers={"Authorization": "Bearer wrong"}, timeout=60)
    # Schemathesis tries other methods on the path, too, and more items than a body has bytes for.
    assert answer.status_code in (401, 405, 413)
    assert "error" in answer.json()


def validate(live: LiveService, case: schemathesis.Case, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    answer = case.call(base_url=live.url, headers=headers, timeout=60)
    refused = answer.status_code == 413  # the check does not know it as a refusal
    case.validate_response(
        answer, checks=[check for check in CHECKS if not (refused and check is negative_data_rejection)]
    )


def test_the_gateway_serves_this_very_document(live: LiveService) -> None:
    assert httpx.get(f"{live.url}/openapi.json").json() == document()
