"""Builds the response object of one request: `openai.types.responses.Response` as plain JSON.

`objects.py` describes the object for the OpenAPI document. The tests check the JSON against that description
and against OpenAI's own types.
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
from serve.formats.responses.tools import HostedTool
from serve.inference.request import GenerationResult

Json = dict[str, Any]


class ResponseBuilder:
    """Builds the response at each stage: in progress, completed, incomplete, failed.

    input_items: the items of this request. context: the items before them, from earlier turns.
    """

    def __init__(
        self, body: ResponsesRequest, request_id: str, input_items: list[Json], context: list[Json]
    ) -> None:
        self._body = body
        self._request_id = request_id
        self._input_items = input_items
        self._context = context

    def output(self) -> Output:
        """An empty output, whose item ids continue those of the input."""
        offers = {offer.name: offer for offer in self._body.offers}
        return Output(Ids(self._request_id, len(self._input_items)), offers)

    def in_progress(self, result: GenerationResult) -> Json:
        return self._response(result, "in_progress", [], stored=self._body.stores)

    def ended(self, result: GenerationResult, output: Output, *, stored: bool) -> Json:
        """The completed response, or the incomplete one that reached its token limit.

        stored: the response's `store` field, which tells the client whether it can be read again.
        """
        status = "completed" if output.complete else "incomplete"
        response = self._response(result, status, output.items, stored=stored)
        if output.complete:
            return response | {"completed_at": int(time.time()), "usage": usage(result.tokens)}
        details = {"reason": "max_output_tokens"}
        return response | {"incomplete_details": details, "usage": usage(result.tokens)}

    def failed(self, result: GenerationResult, output: Output, error: BespokeError) -> Json:
        output.abandon()
        response = self._response(result, "failed", output.items, stored=False)
        detail = {"code": "server_error", "message": body_of(error)["error"]["message"]}
        return response | {"error": detail, "usage": usage(result.tokens)}

    def complete(self, result: GenerationResult, *, stored: bool) -> Json:
        """The response of a request that collects its answer."""
        assert result.choices
        output = self.output()
        output.take_complete(result.choices[0])
        return self.ended(result, output, stored=stored)

    def to_store(self, response: Json) -> StoredResponse:
        return StoredResponse(response, [*self._context, *self._input_items])

    def _response(self, result: GenerationResult, status: str, output: list[Json], *, stored: bool) -> Json:
        body = self._body
        choice = body.tool_choice or "auto"
        reasoning = body.reasoning
        return {
            "id": Ids(self._request_id).response,
            "object": "response",
            "created_at": int(result.created_at.timestamp()),
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": result.model,
            "output": list(output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "service_tier": "default",
            "store": stored,
            "temperature": result.request.sampling.temperature,
            "text": {"format": self._text_format(), "verbosity": "medium"},
            "tool_choice": choice.model_dump() if isinstance(choice, NamedFunctionTool) else choice,
            "tools": [tool.model_dump() for tool in body.tools or () if not isinstance(tool, HostedTool)],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": result.request.sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    def _text_format(self) -> Json:
        text_format = self._body.text.format if self._body.text else None
        return text_format.model_dump(by_alias=True, exclude_none=True) if text_format else {"type": "text"}


def usage(tokens: Tokens) -> Json:
    """The Responses API's `usage` object.

    Reasoning is part of the output tokens and not counted apart. Writing the cache is free.
    """
    return {
        "input_tokens": tokens.prompt,
        "input_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": 0},
        "output_tokens": tokens.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens.prompt + tokens.completion,
    }
