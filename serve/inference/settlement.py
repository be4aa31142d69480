"""How a generation is settled: as what it ended, what is kept with the bill, and until when it is tried."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from itertools import chain, repeat

import sqlalchemy as sa

from serve.billing.ledger.checkpoints import UsageCheckpoints
from serve.billing.ledger.ledger import Resolution
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.events import UsageStatus
from serve.errors import BespokeError, StoreUnavailable
from serve.inference.request import CommitHook, GenerationResult

log = logging.getLogger(__name__)

_RETRY_S = (0.1, 0.5, 1.0, 2.0)
_RETRY_LATER_S = 5.0
_ATTEMPTS_MAX = 5  # at what is not the store's being away: a bug, or a store that is damaged
_REASON_CHARS_MAX = 32


def outcome(
    failure: BespokeError | None, stopped: str | None, reasons: Sequence[str], choices: int
) -> tuple[UsageStatus, str | None]:
    """The usage event's status and finish reason; `reasons` has one for each choice that came to its end."""
    if failure is not None:
        return UsageStatus.FAILED, stopped or "error"
    if stopped and len(reasons) < choices:
        return UsageStatus.DISCONNECTED, "abort"
    return UsageStatus.COMPLETE, reasons[0][:_REASON_CHARS_MAX] if reasons else None


def commit_outcome(
    hook: CommitHook | None, result: GenerationResult, status: UsageStatus
) -> Callable[[sa.Connection], None] | None:
    """Returns what the request's commit hook does in the settling transaction, if it has one.

    An answer that was cut short is billed, and is no answer to give again. A bug in the hook must not undo
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
            raise  # the store is away: the whole settlement is tried again
        except Exception:
            log.exception("the outcome of request %s could not be kept", result.request.request_id)
            hook.on_void(connection)

    return settle_or_void


async def close(commit_queue: CommitQueue, checkpoints: UsageCheckpoints | None, closing: Resolution) -> None:
    """Close the hold, however long the store is away.

    What cannot be closed for another reason is left to the steward, which finds the journal's record when the
    hold's lease has run out: a client must not wait for a bug.
    """
    failures = 0
    for delay_s in chain(_RETRY_S, repeat(_RETRY_LATER_S)):
        try:
            if not await commit_queue.resolve(closing):
                log.warning("request %s was closed by somebody else", closing.request_id)
            if checkpoints is not None:
                checkpoints.forget(closing.request_id)
            return
        except StoreUnavailable:
            await asyncio.sleep(delay_s)
        except Exception:
            failures += 1
            log.exception("request %s cannot be closed", closing.request_id)
            if failures == _ATTEMPTS_MAX:
                return
            await asyncio.sleep(delay_s)
