"""Writes tokens and their log-probabilities as OpenAI's APIs do.

A token that is a part of a character is written as `bytes:\\xf0\\x9f`, by each API in its own place.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from serve.engine.protocol import TokenLogprob

Json = dict[str, Any]


def token_name(token: bytes) -> str:
    """Returns the token's text, or its bytes as text if it is no text. Different tokens differ."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(map(_escaped, token))


def _escaped(byte: int) -> str:
    return chr(byte) if 0x20 <= byte < 0x7F and byte != 0x5C else f"\\x{byte:02x}"


def token_logprob(token: TokenLogprob) -> Json:
    """A token's log-probability and the likeliest tokens, as chat and the Responses API write it."""
    likeliest = [_logprob(*each) for each in token.top]
    return _logprob(token.token, token.logprob or 0.0) | {"top_logprobs": likeliest}


def _logprob(token: bytes, logprob: float) -> Json:
    return {"token": token_name(token), "logprob": logprob, "bytes": list(token)}


def text_logprobs(tokens: Sequence[TokenLogprob], offset: int, likeliest: int) -> Json:
    """The `logprobs` object of text completions. `tokens` begin at the choice's character `offset`.

    likeliest: how many of the likeliest tokens were asked for. A token that is not among them is written
    beside them. Of none, OpenAI writes null.
    """
    ends = list(accumulate((characters(token.token) for token in tokens), initial=offset))
    return {
        "tokens": [token_name(token.token) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top_logprobs(token) for token in tokens] if likeliest else None,
        "text_offset": ends[:-1],
    }


def _top_logprobs(token: TokenLogprob) -> dict[str, float] | None:
    if token.logprob is None:  # a prompt's first token
        return None
    entries: dict[str, float] = {}
    for each, logprob in (*token.top, (token.token, token.logprob)):
        entries.setdefault(token_name(each), logprob)
    return entries


def characters(token: bytes) -> int:
    """Returns how many characters begin in the token."""
    return sum(byte & 0xC0 != 0x80 for byte in token)
