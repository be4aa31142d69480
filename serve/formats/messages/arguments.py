"""Reads the arguments of a tool call as the object that Anthropic's API gives."""

import json
from functools import partial
from typing import Any

import pydantic_core

Json = dict[str, Any]


def input_of(arguments: str) -> Json:
    """The call's arguments as an object. Of arguments that are cut, it is what was parsed so far.

    So does Anthropic's own client with a stream's pieces: a string that is cut is left out.
    Arguments that are no JSON go where its documentation puts them: docs.anthropic.com/en/docs/
    agents-and-tools/tool-use/fine-grained-tool-streaming, "invalid JSON".
    """
    text = arguments if arguments.strip() else "{}"
    for read in (json.loads, partial(pydantic_core.from_json, allow_partial=True)):
        try:
            parsed = read(text)
            json.dumps(parsed)  # a number may have too many digits
        except (ValueError, RecursionError):
            continue
        if isinstance(parsed, dict):
            return parsed
    return {"INVALID_JSON": arguments}
