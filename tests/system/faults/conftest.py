"""One real application on a real PostgreSQL, whose processes tests kill."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import SecretStr

from serve.billing.ledger.verification import verify
from serve.settings import EngineSettings, Settings
from serve.storage.database import Store
from tests.support.billing_fixture import onboard
from tests.support.constants import TENANTS, TINY
from tests.support.live_service import import_tiny_bases
from tests.support.ports import free_port
from tests.support.postgres import Postgres
from tests.system.faults.fail_points import FailPoints, FaultyEngine, FaultyGateway, FaultySteward
from tests.system.faults.fault_site import GATEWAYS, FaultSite, Observation

OBSERVATIONS = "BESPOKE_FAULTS_JSON"  # names the file to write all observations to


@pytest.fixture(scope="package")
def _site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultSite]:
    from serve.deployment import ray_app as deployment
    from serve.deployment.local import LocalService

    home = tmp_path_factory.mktemp("faults")
    import_tiny_bases(home)
    observations: list[Observation] = []
    with Postgres() as postgres, pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployment, "GatewayDeployment", FaultyGateway)
        patch.setattr(deployment, "EngineDeployment", FaultyEngine)
        patch.setattr(deployment, "StewardDeployment", FaultySteward)
        settings = Settings(
            home=home,
            port=free_port(),
            bases=[TINY],
            database_url=SecretStr(postgres.create_database()),
            gateway_replicas=GATEWAYS,
            accept_timeout_s=10,
            drain_timeout_s=5,
            engine=EngineSettings(dtype="float32", max_model_len=1024, max_loras=0, enforce_eager=True),
        )
        with contextlib.closing(Store(settings.store_url)) as store:
            keys = onboard(store, home, TENANTS)
            with LocalService(settings) as service:
                yield FaultSite(service.url, settings, store, keys, postgres, FailPoints(home), observations)
            # What the service did not start, it does not end.
            assert [check for check in verify(store) if check.mismatches] == []
    if path := os.environ.get(OBSERVATIONS):
        rows = [asdict(observation) for observation in observations]
        Path(path).write_text(json.dumps(rows, indent=1))


@pytest.fixture
def site(_site: FaultSite) -> Iterator[FaultSite]:
    """The site with all its replicas. Afterwards the ledger must be right."""
    _site.wait_until_complete()
    yield _site
    _site.check()
