"""One replica brought to what the catalogue wants: new versions probed, pinned kept, retired ones dropped.

Level-triggered: a replica looks at the catalogue's revision when it starts and once a second from then on,
and acts on what it finds. So nothing is lost that was said while it, or a gateway, was away.
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
    """Keeps `engine`, which serves `base`, in step with `catalogue`."""

    def __init__(
        self, registry: AdapterRegistry, engine: VllmEngine, base: str, now: Callable[[], datetime]
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._base = base
        self._now = now
        self._seen = -1
        self._turn = asyncio.Lock()

    async def reconcile(self) -> None:
        """Do what is to be done, if anything changed. Raises StoreUnavailable, EngineUnavailable."""
        async with self._turn:
            revision = await asyncio.to_thread(self._registry.revision)
            if revision == self._seen:
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
            # The verdicts above made revisions of their own; the next look finds nothing to do in them.
            self._seen = revision

    async def run(self) -> None:
        """Reconcile once a second, for ever."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.reconcile()
            except StoreUnavailable:
                pass  # requests are refused meanwhile, so nobody misses an adapter
            except BespokeError:
                log.exception("the catalogue's wishes are not carried out yet")
                await asyncio.sleep(_RETRY_S)
