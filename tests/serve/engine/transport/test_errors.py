"""Checks that errors cross the connection as plain values, and only ours do."""

import msgspec
import pytest

from serve import errors
from serve.engine.transport.errors import TYPES, decode_error, encode_error
from serve.engine.transport.frames import Failed, Frame, frames
from serve.errors import BespokeError, EngineFailed
from tests.serve.api.test_errors import EXAMPLES, subclasses


def sent(failed: Failed) -> BespokeError:
    """Returns the error as a gateway gets it, through the bytes of a real frame."""
    frame = frames.decode(msgspec.msgpack.encode(Frame([("req_1", [failed])])))
    ((_, (received,)),) = frame.entries
    assert isinstance(received, Failed)
    return decode_error(received)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_every_error_arrives_with_its_type_its_message_and_its_data(error: BespokeError) -> None:
    copy = sent(encode_error(error))
    assert type(copy) is type(error)
    assert (copy.args, copy.message, copy.__dict__) == (error.args, error.message, error.__dict__)


def test_the_list_of_types_is_the_whole_tree_and_nothing_else() -> None:
    tree = {cls for cls in subclasses(BespokeError) if cls.__module__ == errors.__name__}
    assert set(TYPES.values()) == tree | {BespokeError}


@pytest.mark.parametrize(
    "failed",
    [
        Failed("SystemExit", (3,)),
        Failed("Exception", ("no",)),
        Failed("ContextLengthExceeded", (1,)),
        Failed("ContextLengthExceeded", ("many", 1, None, "messages")),
        Failed("BudgetExceeded", ("galaxy", "month", 1, 2, 3)),
        Failed("", ()),
    ],
    ids=lambda failed: f"{failed.name}{failed.arguments}",
)
def test_an_unknown_type_or_arguments_that_do_not_fit_are_a_failed_engine(failed: Failed) -> None:
    assert type(sent(failed)) is EngineFailed


class Private(errors.OperatorError):
    """Stands for an error that no gateway knows."""


@pytest.mark.parametrize(
    "error", [Private("no"), errors.OperatorError({"not": "plain"})], ids=["type", "value"]
)
def test_an_error_that_cannot_travel_becomes_a_failed_engine(error: BespokeError) -> None:
    assert type(sent(encode_error(error))) is EngineFailed


def test_nothing_of_the_transport_is_pickled() -> None:
    from serve.engine.transport import frames, gateway_side, replica_side

    for module in (frames, gateway_side, replica_side):
        assert not hasattr(module, "pickle")
