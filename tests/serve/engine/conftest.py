"""One real engine for the whole folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.engine.vllm.engine import VllmEngine
from tests.support.constants import TINY
from tests.support.engine_host import SETTINGS, EngineHost, EventLoopThread


@pytest.fixture(scope="package")
def host(
    base_dir: Path, loop: EventLoopThread, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineHost]:
    adapters_dir = tmp_path_factory.mktemp("home") / "adapters"
    engine = loop.run(VllmEngine.start(TINY, base_dir, adapters_dir, SETTINGS, "replica"), 300)
    yield EngineHost(engine, loop, base_dir, adapters_dir)
    engine.shutdown()
