"""Brings one replica to the registry's desired state: probes new versions, loads pinned, drops retired ones.

It is level-triggered: a replica compares the registry's revision when it starts and once a second from then
on, and acts on the difference. So no change is lost that was made while it, or a gateway, was down.
"""

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime

from serve.engine.adapters.probe import probe
from serve.engine.vllm.engine import VllmEngine
from serve.errors import BespokeError, StoreUnavailable
from serve.registry.registry import AdapterRegistry
from serve.registry.versions import VersionState

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
_RETRY_S = 10.0


class Reconciler:
    """Keeps `engine`, which serves `base`, in the state that `registry` desires."""

    def __init__(
        self, registry: AdapterRegistry, engine: VllmEngine, base: str, now: Callable[[], datetime]
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._base = base
        self._now = now
        self._revision = -1
        self._reconciling = asyncio.Lock()

    async def reconcile(self) -> None:
        """Applies the desired state, if it changed. Raises StoreUnavailable, EngineUnavailable."""
        async with self._reconciling:
            revision = await asyncio.to_thread(self._registry.revision)
            if revision == self._revision:
                return
            desired = await asyncio.to_thread(self._registry.desired, self._base)
            for wanted in desired:
                if wanted.state == VersionState.PENDING:
                    reason = await probe(self._engine, wanted.ref)
                    if reason is None:
                        await asyncio.to_thread(self._registry.mark_ready, wanted.ref, self._now())
                    else:
                        log.warning("%s is rejected: %s", wanted.ref.model, reason)
                        await asyncio.to_thread(self._registry.reject, wanted.ref, reason, self._now())
            await self._engine.apply_desired(
                frozenset(wanted.ref.id for wanted in desired),
                [wanted.ref for wanted in desired if wanted.pinned],
            )
            # The verdicts above made revisions of their own. The next look finds nothing to do in them.
            self._revision = revision

    async def run(self) -> None:
        """Reconciles once a second. Never returns."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.reconcile()
            except StoreUnavailable:
                pass  # requests are refused meanwhile, so nobody misses an adapter
            except BespokeError:
                log.exception("the registry's desired state is not applied yet")
                await asyncio.sleep(_RETRY_S)
