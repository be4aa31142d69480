"""One service for the whole folder: first elastic, with one engine replica, then with two."""

from collections.abc import Iterator

import pytest

from tests.support.collector import Collector
from tests.system.replicas.replica_service import ReplicaService


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="package")
def _service(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[ReplicaService]:
    service = ReplicaService.prepare(tmp_path_factory.mktemp("replicas"), collector.endpoint)
    yield service
    service.stop()


@pytest.fixture
def elastic(_service: ReplicaService) -> ReplicaService:
    """One gateway and one engine replica, each of which may become two."""
    _service.deploy_elastic()
    return _service


@pytest.fixture
def pair(_service: ReplicaService) -> ReplicaService:
    """One gateway in front of two engine replicas."""
    _service.deploy_pair()
    return _service
