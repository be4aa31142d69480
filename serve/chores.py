"""Settings → steward: the composition root of the steward's process."""

from collections.abc import Mapping
from datetime import timedelta

from serve.db import Store
from serve.engine.base import Engine
from serve.settings import Settings
from serve.steward import Steward


def build_steward(settings: Settings, engines: Mapping[str, Engine]) -> Steward:
    """The steward of the store, the engines and this machine's journals. Migrates the store first."""
    store = Store(settings.store_url)
    store.migrate()
    return Steward(
        store, engines, settings.journals_dir, lease=timedelta(seconds=settings.request_timeout_s + 120)
    )
