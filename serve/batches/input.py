"""Reads and validates a batch's input: JSON lines, each a request to the batch's endpoint.

platform.openai.com/docs/guides/batch: {"custom_id", "method": "POST", "url", "body"}. The same code parses
and bounds these bodies as those of direct requests.
"""

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from serve.batches.batches import ERRORS_MAX, LineError
from serve.errors import InvalidRequest
from serve.formats import chat, completions, embeddings
from serve.formats.body_budget import check_body
from serve.formats.chat import ChatCompletionRequest
from serve.formats.response_format import CompleteFormat, Json
from serve.formats.sampling import RequestBounds, parse
from serve.inference.request import InferenceRequest

CUSTOM_ID_CHARS_MAX = 512
LINE_BYTES = 8 * 1024  # around its body
EMBEDDED_TEXTS_MAX = 50_000  # of a batch: OpenAI's. Each becomes kilobytes of the output.


@dataclass(frozen=True, slots=True)
class InputBounds:
    """Holds the most lines of a batch, the most bytes of a body, and the bounds on a body's fields."""

    lines: int
    body_bytes: int
    fields: RequestBounds


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Translates an endpoint's bodies.

    to_request: (body, request id, bounds) -> InferenceRequest; raises InvalidRequest.
    response_format: makes the format of one answer.
    """

    to_request: Callable[[bytes, str, RequestBounds], InferenceRequest]
    response_format: Callable[[], CompleteFormat]


@dataclass(frozen=True, slots=True)
class InputLine:
    """One request; `body` is its JSON text."""

    custom_id: str
    method: str
    url: str
    body: bytes


def _chat(body: bytes, request_id: str, limits: RequestBounds) -> InferenceRequest:
    parsed = parse(ChatCompletionRequest, body)
    _refuse_stream(parsed.stream)
    return chat.request_of(parsed, request_id, limits)


def _completion(body: bytes, request_id: str, limits: RequestBounds) -> InferenceRequest:
    parsed = parse(completions.CompletionRequest, body)
    _refuse_stream(parsed.stream)
    return completions.request_of(parsed, request_id, limits)


def _embeddings(body: bytes, request_id: str, limits: RequestBounds) -> InferenceRequest:
    return embeddings.request_of(parse(embeddings.EmbeddingRequest, body), request_id, limits)


ENDPOINTS = {
    "/v1/chat/completions": Endpoint(_chat, chat.ChatFormat),
    "/v1/completions": Endpoint(_completion, completions.CompletionFormat),
    "/v1/embeddings": Endpoint(_embeddings, embeddings.EmbeddingFormat),
}


def numbered_lines(path: Path) -> Generator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers in the file, from 1."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield number, raw


def read_line(raw: bytes) -> InputLine:
    """Raises InvalidRequest."""
    check_body(raw)
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        raise InvalidRequest("This line is not valid JSON.", None, "invalid_json_line") from None
    if not isinstance(data, dict):
        raise InvalidRequest("This line is not a JSON object.", None, "invalid_json_line")
    custom_id = _text(data, "custom_id")
    if not custom_id.isprintable() or len(custom_id) > CUSTOM_ID_CHARS_MAX:
        text = f"'custom_id' has between 1 and {CUSTOM_ID_CHARS_MAX} printable characters."
        raise InvalidRequest(text, "custom_id", "invalid_value")
    body = data.get("body")
    if not isinstance(body, dict):
        raise InvalidRequest("'body' must be a JSON object.", "body", "missing_required_parameter")
    return InputLine(custom_id, _text(data, "method"), _text(data, "url"), _json(body))


def validate(path: Path, endpoint: str, bounds: InputBounds) -> tuple[int, list[LineError]]:
    """(number of requests, errors). No line of a file with an error may run."""
    errors: list[LineError] = []
    seen: dict[str, int] = {}
    count = embedded = 0
    for number, raw in numbered_lines(path):
        count += 1
        if count > bounds.lines:
            text = f"The file has more than {bounds.lines} requests."
            return 0, [LineError("too_many_lines", text, number)]
        try:
            if len(raw) > bounds.body_bytes + LINE_BYTES:
                text = f"This line is larger than the limit of {bounds.body_bytes + LINE_BYTES} bytes."
                raise InvalidRequest(text, "body", "request_too_large")
            line = read_line(raw)
            request = _check(line, endpoint, bounds)
            embedded += request.choices if request.pooling is not None else 0
            if embedded > EMBEDDED_TEXTS_MAX:
                text = f"The file has more than {EMBEDDED_TEXTS_MAX} texts to embed."
                return 0, [LineError("too_many_inputs", text, number)]
            if (first := seen.setdefault(line.custom_id, number)) != number:
                text = f"The 'custom_id' of this line is that of line {first}, too."
                raise InvalidRequest(text, "custom_id", "duplicate_custom_id")
        except InvalidRequest as error:
            errors.append(LineError(error.code or "invalid_request", error.message, number, error.param))
        if len(errors) == ERRORS_MAX:
            break
    if count == 0:
        errors.append(LineError("empty_file", "The file has no requests."))
    return count, errors


def _check(line: InputLine, endpoint: str, bounds: InputBounds) -> InferenceRequest:
    if line.method != "POST":
        raise InvalidRequest("'method' must be POST.", "method", "invalid_method")
    if line.url != endpoint:
        raise InvalidRequest(f"'url' must be the batch's endpoint, {endpoint}.", "url", "invalid_url")
    if len(line.body) > bounds.body_bytes:
        text = f"The body is larger than the limit of {bounds.body_bytes} bytes."
        raise InvalidRequest(text, "body", "request_too_large")
    try:
        return ENDPOINTS[endpoint].to_request(line.body, "validation", bounds.fields)
    except InvalidRequest as error:
        param = f"body.{error.param}" if error.param else "body"
        raise InvalidRequest(error.message, param, error.code) from error


def _text(data: Json, name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"'{name}' must be a text.", name, "missing_required_parameter")
    return value


def _json(body: Json) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, RecursionError):  # half a surrogate pair, or NaN
        raise InvalidRequest("'body' is not valid JSON.", "body", "invalid_json_line") from None


def _refuse_stream(stream: bool | None) -> None:
    if stream:
        raise InvalidRequest("A batch does not stream.", "stream", "unsupported_parameter")
