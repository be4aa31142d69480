"""How a generation is settled: as what it ended, what is kept with the bill, and until when it is tried."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING

import sqlalchemy as sa

from serve.billing.ledger.checkpoints import Journal
from serve.billing.ledger.ledger import Closing
from serve.billing.ledger.writer import Books
from serve.billing.metering.events import Status
from serve.errors import BespokeError, StoreUnavailable

if TYPE_CHECKING:
    from serve.inference.generation import Generation

log = logging.getLogger(__name__)

_RETRY_S = (0.1, 0.5, 1.0, 2.0)
_RETRY_LATER_S = 5.0
_ATTEMPTS_MAX = 5  # at what is not the store's being away: a bug, or a store that is damaged
_REASON_CHARS_MAX = 32


def outcome(
    failure: BespokeError | None, stopped: str | None, reasons: Sequence[str], choices: int
) -> tuple[Status, str | None]:
    """The usage event's status and finish reason; `reasons` has one for each choice that came to its end."""
    if failure is not None:
        return Status.FAILED, stopped or "error"
    if stopped and len(reasons) < choices:
        return Status.DISCONNECTED, "abort"
    return Status.COMPLETE, reasons[0][:_REASON_CHARS_MAX] if reasons else None


def keeping(generation: "Generation", status: Status) -> Callable[[sa.Connection], None] | None:
    """What the call's keeper does in the settling transaction.

    What was cut short is billed, and is no answer to give again. A bug in keeping must not unsettle it.
    """
    keeper = generation.call.keeper
    if keeper is None:
        return None
    if status is not Status.COMPLETE:
        return keeper.release

    def keep_or_release(connection: sa.Connection) -> None:
        try:
            with connection.begin_nested():
                keeper.keep(connection, generation)
        except sa.exc.OperationalError:
            raise  # the store is away: the whole settlement is tried again
        except Exception:
            log.exception("the outcome of request %s could not be kept", generation.call.request_id)
            keeper.release(connection)

    return keep_or_release


async def close(books: Books, journal: Journal | None, closing: Closing) -> None:
    """Close the hold, however long the store is away.

    What cannot be closed for another reason is left to the steward, which finds the journal's record when the
    hold's lease has run out: a client must not wait for a bug.
    """
    failures = 0
    for delay_s in chain(_RETRY_S, repeat(_RETRY_LATER_S)):
        try:
            if not await books.close(closing):
                log.warning("request %s was closed by somebody else", closing.request_id)
            if journal is not None:
                journal.forget(closing.request_id)
            return
        except StoreUnavailable:
            await asyncio.sleep(delay_s)
        except Exception:
            failures += 1
            log.exception("request %s cannot be closed", closing.request_id)
            if failures == _ATTEMPTS_MAX:
                return
            await asyncio.sleep(delay_s)
