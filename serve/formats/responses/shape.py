"""The response object of one request: `openai.types.responses.Response`.

Built as plain JSON, like every answer of ours; `objects.py` describes it and the tests hold both against each
other and against OpenAI's own types.
"""

import time
from typing import Any

from serve.billing.pricing.plans import Tokens
from serve.client_data.stored_responses import StoredResponse
from serve.errors import BespokeError
from serve.formats.errors import body_of
from serve.formats.responses.items import Ids
from serve.formats.responses.output import Output
from serve.formats.responses.request import NamedFunctionTool, ResponsesRequest
from serve.inference.request import GenerationResult

Json = dict[str, Any]


class ResponseObjectFormat:
    """Knows what was asked, and makes the response of it at each stage.

    own: the items that this request brought. context: those before them, from earlier turns.
    """

    def __init__(
        self, asked: ResponsesRequest, request_id: str, own: list[Json], context: list[Json]
    ) -> None:
        self._asked = asked
        self._request_id = request_id
        self._own = own
        self._context = context

    def output(self) -> Output:
        """An empty output, whose ids go on where the input's end."""
        return Output(Ids(self._request_id, len(self._own)))

    def begun(self, result: GenerationResult) -> Json:
        return self._response(result, "in_progress", [], stored=self._asked.keeps)

    def ended(self, result: GenerationResult, output: Output, *, stored: bool) -> Json:
        """Completed, or incomplete because it grew too long. `stored` is told to the client as it is."""
        status = "completed" if output.complete else "incomplete"
        body = self._response(result, status, output.items, stored=stored)
        if output.complete:
            return body | {"completed_at": int(time.time()), "usage": usage(result.tokens)}
        details = {"reason": "max_output_tokens"}
        return body | {"incomplete_details": details, "usage": usage(result.tokens)}

    def failed(self, result: GenerationResult, output: Output, error: BespokeError) -> Json:
        output.abandon()
        body = self._response(result, "failed", output.items, stored=False)
        told = {"code": "server_error", "message": body_of(error)["error"]["message"]}
        return body | {"error": told, "usage": usage(result.tokens)}

    def whole(self, result: GenerationResult, *, stored: bool) -> Json:
        """The response of a generation that has gathered its answer."""
        assert result.choices
        output = self.output()
        output.whole(result.choices[0])
        return self.ended(result, output, stored=stored)

    def to_store(self, body: Json) -> StoredResponse:
        return StoredResponse(body, [*self._context, *self._own])

    def _response(self, result: GenerationResult, status: str, output: list[Json], *, stored: bool) -> Json:
        asked = self._asked
        choice = asked.tool_choice or "auto"
        reasoning = asked.reasoning
        return {
            "id": Ids(self._request_id).response,
            "object": "response",
            "created_at": int(result.created_at.timestamp()),
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": None,
            "metadata": asked.metadata or {},
            "model": result.model,
            "output": list(output),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "service_tier": "default",
            "store": stored,
            "temperature": result.request.sampling.temperature,
            "text": {"format": self._format(), "verbosity": "medium"},
            "tool_choice": choice.model_dump() if isinstance(choice, NamedFunctionTool) else choice,
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": result.request.sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": asked.user,
        }

    def _format(self) -> Json:
        asked = self._asked.text.format if self._asked.text else None
        return asked.model_dump(by_alias=True, exclude_none=True) if asked else {"type": "text"}


def usage(tokens: Tokens) -> Json:
    """Reasoning is part of the output's tokens; it is not counted apart, and nobody pays to write a cache."""
    return {
        "input_tokens": tokens.prompt,
        "input_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": 0},
        "output_tokens": tokens.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens.prompt + tokens.completion,
    }
