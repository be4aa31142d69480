"""Checks the regular expressions and the texts that an answer may be restricted to."""

import re

from serve.engine.protocol import TextFormat
from serve.errors import InvalidRequest

_REASON_CHARS_MAX = 300
_PLACE = re.compile(r"^.*?\.(?:cc|h):\d+:\s*", re.DOTALL)  # a time and the place in xgrammar's source


def check_text_format(text: TextFormat) -> None:
    """Raises InvalidRequest for what gives no grammar. The gateway has bounded it: a millisecond."""
    import xgrammar

    if text.regex is None:
        return
    try:
        xgrammar.Grammar.from_regex(text.regex)
    except Exception as error:  # of several types, from C++
        reason = _PLACE.sub("", str(error)).strip().split("\n")[0][:_REASON_CHARS_MAX]
        message = f"'{text.param}' cannot be made a grammar: {reason}"
        raise InvalidRequest(message, text.param, "invalid_value") from error


def structured_outputs_of(text: TextFormat) -> dict[str, str | list[str]]:
    """Returns vLLM's field for the format."""
    return {"regex": text.regex} if text.regex is not None else {"choice": list(text.choices)}
