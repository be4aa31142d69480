"""Carries errors between replica and gateway as plain values: a type's name and its arguments.

Nothing is unpickled. The names are those of `serve.errors`, a closed list, and an error's `args` are always
its constructor's arguments (see there).
"""

import logging

from serve import errors
from serve.engine.transport.frames import Failed
from serve.errors import BespokeError, EngineFailed

log = logging.getLogger(__name__)

TYPES: dict[str, type[BespokeError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, BespokeError)
}


def encode_error(error: BespokeError) -> Failed:
    """The frame's form of `error`. One that cannot travel becomes EngineFailed."""
    name, plain = type(error).__name__, (str, int, float, type(None))
    if TYPES.get(name) is type(error) and all(isinstance(argument, plain) for argument in error.args):
        return Failed(name, error.args)
    log.error("an error of type %s cannot be sent to a gateway", name)
    return encode_error(EngineFailed())


def decode_error(failed: Failed) -> BespokeError:
    """The error that the replica raised; EngineFailed for an unknown type or arguments that do not fit."""
    try:
        error = TYPES[failed.name](*failed.arguments)
        str(error)  # some messages are computed from the arguments
    except Exception:
        log.exception("a replica ended a request with an error that is not ours: %s", failed.name)
        return EngineFailed()
    return error
