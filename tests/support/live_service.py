"""A running service as its users and its operator see it, and the tiny bases and adapters to run it with."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import sqlalchemy as sa
from openai.types import Batch

from serve.billing.ledger.ledger import Ledger
from serve.billing.metering.events import usage_table
from serve.billing.metering.queries import UsageQueries
from serve.billing.metering.reconciliation import reconcile
from serve.commands.usage import engine_counts
from serve.registry.registry import AdapterRegistry
from serve.registry.versions import AdapterVersion
from serve.settings import Settings
from serve.storage.database import Store
from serve.tenants import Tenants, server_secret
from tests.support.constants import CONFIGS, MINILM, NOON, TENANTS, TINY, TINY_TWO
from tests.support.serve_details import live_replicas
from tests.support.waiting import wait_until

HELLO = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True)
class LiveService:
    """The running gateway, as its users see it, and its store, as its operator sees it."""

    url: str
    settings: Settings
    store: Store
    keys: dict[str, str]
    metrics_at_start: tuple[str, ...] = field(default=(), kw_only=True)

    def client(self, tenant: str = TENANTS[0]) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[tenant], max_retries=0, timeout=120)

    def post(self, body: object, *, tenant: str = TENANTS[0], **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(
            f"{self.url}/v1/chat/completions",
            content=content,
            headers={"Authorization": f"Bearer {self.keys[tenant]}"} | headers,
            timeout=120,
        )

    @property
    def tenants(self) -> Tenants:
        return Tenants(self.store, server_secret(self.settings.home))

    def wait_idle(self) -> None:
        wait_until(lambda: not Ledger(self.store).open_holds())

    def last_event(self) -> dict[str, object]:
        query = sa.select(usage_table).order_by(usage_table.c.id.desc()).limit(1)
        with self.store.read() as connection:
            return dict(connection.execute(query).mappings().one())

    def count_events(self) -> int:
        with self.store.read() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(usage_table)).scalar_one()

    def running_pids(self, deployment: str) -> dict[str, int]:
        """The process of each replica of `deployment` that serves, by the replica's id."""
        return {
            replica["replica_id"]: replica["pid"]
            for replica in live_replicas(deployment)
            if replica["state"] == "RUNNING"
        }

    def assert_reconciled(self) -> None:
        """The ledger agrees with the engines' own counters."""
        entries = reconcile(engine_counts(self.url), UsageQueries(self.store).by_engine())
        assert entries
        assert [(entry.prompt_drift, entry.completion_drift) for entry in entries] == [(0, 0)] * len(entries)


def run_batch(client: openai.OpenAI, endpoint: str, bodies: Iterable[object]) -> Batch:
    """Runs the bodies as one batch, of lines `line-0` and so on, and returns it completed."""
    lines = [
        {"custom_id": f"line-{number}", "method": "POST", "url": endpoint, "body": body}
        for number, body in enumerate(bodies)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    uploaded = client.files.create(file=("work.jsonl", content), purpose="batch")
    assert uploaded.bytes == len(content)
    batch = client.batches.create(
        input_file_id=uploaded.id, endpoint=cast(Any, endpoint), completion_window="24h"
    )

    def ended() -> bool:
        return client.batches.retrieve(batch.id).status in ("completed", "failed", "expired", "cancelled")

    wait_until(ended, timeout_s=120, interval_s=0.5)
    done = client.batches.retrieve(batch.id)
    assert done.status == "completed", done
    return done


def import_tiny_bases(home: Path) -> None:
    """Makes the two tiny bases; they differ in the seed of their random weights."""
    from quantize.base_import import import_base
    from quantize.config import BaseConfig, read_config

    spec = read_config(CONFIGS / "bases" / "tiny.yaml", BaseConfig)
    import_base(spec, home / "bases")
    assert spec.random_llama is not None
    other = spec.random_llama.model_copy(update={"seed": 1})
    import_base(spec.model_copy(update={"name": TINY_TWO, "random_llama": other}), home / "bases")


def import_embedding_base(home: Path) -> Path:
    """Imports the base that makes embeddings, and returns its folder."""
    from quantize.base_import import import_base
    from quantize.config import BaseConfig, read_config

    return import_base(read_config(CONFIGS / "bases" / f"{MINILM}.yaml", BaseConfig), home / "bases")


def register_and_promote(registry: AdapterRegistry, directory: Path, home: Path) -> AdapterVersion:
    """Registers and promotes the version in `directory`, as `bespoke adapter promote` does."""
    adapter = registry.register(directory, at=NOON, base_dir=home / "bases" / TINY, max_rank=16)
    registry.promote(adapter, at=NOON)
    return adapter
