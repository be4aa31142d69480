"""Settles a generation: decides its status, runs its commit hook, retries until the hold is closed."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from itertools import chain, repeat

import sqlalchemy as sa

from serve.billing.ledger.checkpoints import UsageCheckpoints
from serve.billing.ledger.holds import Resolution
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.events import UsageStatus
from serve.errors import BespokeError, StoreUnavailable
from serve.inference.request import CommitHook, GenerationResult

log = logging.getLogger(__name__)

_RETRY_S = (0.1, 0.5, 1.0, 2.0)
_RETRY_LATER_S = 5.0
_ATTEMPTS_MAX = 5  # for errors other than an unreachable store: a bug, or a damaged store
_REASON_CHARS_MAX = 32


def outcome(
    failure: BespokeError | None, stop_cause: str | None, finish_reasons: Sequence[str], choices: int
) -> tuple[UsageStatus, str | None]:
    """The usage event's status and finish reason.

    stop_cause: why the gateway stopped the engine, if it did. finish_reasons: one for each finished choice.
    """
    if failure is not None:
        return UsageStatus.FAILED, stop_cause or "error"
    if stop_cause and len(finish_reasons) < choices:
        return UsageStatus.DISCONNECTED, "abort"
    return UsageStatus.COMPLETE, finish_reasons[0][:_REASON_CHARS_MAX] if finish_reasons else None


def commit_outcome(
    hook: CommitHook | None, result: GenerationResult, status: UsageStatus
) -> Callable[[sa.Connection], None] | None:
    """Returns the hook's part of the settling transaction; None without a hook.

    An answer that was cut short is billed, but it is not stored as an answer. A bug in the hook must not undo
    the settlement.
    """
    if hook is None:
        return None
    if status is not UsageStatus.COMPLETE:
        return hook.on_void

    def settle_or_void(connection: sa.Connection) -> None:
        try:
            with connection.begin_nested():
                hook.on_settle(connection, result)
        except sa.exc.OperationalError:
            raise  # the store cannot be reached: the settlement is retried as a whole
        except Exception:
            log.exception("the outcome of request %s could not be kept", result.request.request_id)
            hook.on_void(connection)

    return settle_or_void


async def close(
    commit_queue: CommitQueue, checkpoints: UsageCheckpoints | None, resolution: Resolution
) -> None:
    """Close the hold, however long the store cannot be reached.

    A hold that cannot be closed for another reason is left to the steward, which finds the usage checkpoint
    once the hold's lease has run out: a client must not wait for a bug.
    """
    failures = 0
    for delay_s in chain(_RETRY_S, repeat(_RETRY_LATER_S)):
        try:
            if not await commit_queue.resolve(resolution):
                log.warning("request %s was closed by somebody else", resolution.request_id)
            if checkpoints is not None:
                checkpoints.forget(resolution.request_id)
            return
        except StoreUnavailable:
            await asyncio.sleep(delay_s)
        except Exception:
            failures += 1
            log.exception("request %s cannot be closed", resolution.request_id)
            if failures == _ATTEMPTS_MAX:
                return
            await asyncio.sleep(delay_s)
