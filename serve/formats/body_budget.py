"""Bounds what a JSON body becomes, by counting its bytes before anything is made of them.

A megabyte of `[],` becomes a third of a million objects, and as many errors if they are wrong. Parsing and
validation hold the interpreter, so a thread alone would not help other requests: the body is refused first.
"""

from typing import Annotated, Any, TypeVar

from pydantic import Field

from serve.errors import InvalidRequest

T = TypeVar("T")
# A client's list of models. The first wrong item ends it: an error for each would cost more than the items.
# The installation's own bounds are lower, and checked later, with a message of their own.
ITEMS_MAX = 2048
FreeObject = Annotated[dict[str, Any], Field(max_length=ITEMS_MAX, fail_fast=True)]
Items = Annotated[list[T], Field(max_length=ITEMS_MAX, fail_fast=True)]

# A container costs a dozen times what a number or a short string does: it may be a model with our validators.
CONTAINER_COST = 16
# A prompt of 131,000 token ids, or 7,700 objects.
COST_MAX = 1 << 17
DEPTH_MAX = 64
THREAD_BYTES_MIN = 32 * 1024  # a larger body is read in a thread

_OPENING, _BRACKETS = b"[{", b"[{]}"
_NO_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))


def check_body(body: bytes) -> None:
    """Raises InvalidRequest for a body of too many or too deep values, whether it is valid JSON or not."""
    containers = body.count(b"[") + body.count(b"{")
    if body.count(b",") + containers * CONTAINER_COST <= COST_MAX and containers <= DEPTH_MAX:
        return  # even if all of them stand outside of strings
    outside = _outside_strings(body)
    containers = outside.count(b"[") + outside.count(b"{")
    if outside.count(b",") + containers * CONTAINER_COST > COST_MAX:
        raise _too_many()
    if containers > DEPTH_MAX and _depth(outside) > DEPTH_MAX:
        raise InvalidRequest(f"The body is more than {DEPTH_MAX} levels deep.", None, "body_too_complex")


def _outside_strings(body: bytes) -> bytes:
    """What stands between the strings, whose punctuation costs nothing."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if body.count(b'"') > 4 * COST_MAX:  # two strings, a key and its value, for each comma
        raise _too_many()
    return b"".join(body.split(b'"')[::2])


def _depth(outside: bytes) -> int:
    depth = deepest = 0
    for byte in outside.translate(None, _NO_BRACKETS):
        depth += 1 if byte in _OPENING else -1
        deepest = max(deepest, depth)
    return deepest


def _too_many() -> InvalidRequest:
    return InvalidRequest("The body holds too many values.", None, "body_too_complex")
