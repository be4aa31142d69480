"""Renders a request into vLLM's input: prompt tokens and sampling parameters.

Chat templates, tools and structured output are vLLM's own code (`vllm.renderers`), which knows the models'
formats. This module translates our typed request into vLLM's, and vLLM's refusals into ours. vLLM is imported
inside functions: the gateway shares this package and must not load torch.
"""

import json
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import pydantic_core

from serve.engine.protocol import GenerationRequest, Message, Texts, Toolbox, ToolCall
from serve.engine.vllm import upstream
from serve.engine.vllm.vocabulary import Vocabulary
from serve.errors import BespokeError, ContextLengthExceeded, InvalidRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rendered:
    """Holds vLLM's input and parameters for each prompt. `request` is vLLM's own form of it."""

    request: Any
    inputs: list[Any]
    params: list[Any]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(each["prompt_token_ids"]) for each in self.inputs)

    @property
    def completion_tokens_max(self) -> int:
        """Returns how many tokens each choice may have, whichever prompt it continues."""
        return min(int(each.max_tokens) for each in self.params)


class PromptRenderer:
    """Renders requests for one AsyncLLM. The parsers are vLLM's names, or None where the base has none."""

    def __init__(self, llm: Any, *, tool_parser: str | None, reasoning_parser: str | None) -> None:
        self._config = llm.model_config
        self._has_tools = tool_parser is not None
        self._online = upstream.make_renderer(llm, tool_parser=tool_parser, reasoning_parser=reasoning_parser)
        self.vocabulary = Vocabulary(self.tokenizer)

    @property
    def context_tokens_max(self) -> int:
        return int(self._config.max_model_len)

    @property
    def tokenizer(self) -> Any:
        return self._online.renderer.get_tokenizer()

    async def render(self, request: GenerationRequest) -> Rendered:
        """Renders `request`. Raises InvalidRequest, ContextLengthExceeded."""
        vllm_request, inputs, param = await self._inputs(request)
        return Rendered(
            vllm_request, inputs, [self._params(request, vllm_request, each, param) for each in inputs]
        )

    async def count(self, request: GenerationRequest) -> int:
        """Counts the prompt's tokens as `render` would, also of a prompt that the context cannot hold.

        Raises InvalidRequest.
        """
        _, inputs, _ = await self._inputs(request)
        return sum(len(each["prompt_token_ids"]) for each in inputs)

    async def _inputs(self, request: GenerationRequest) -> tuple[Any, list[Any], str]:
        """Returns vLLM's request, its inputs, and the name of the client's prompt."""
        param = "prompt" if isinstance(request.prompt, Texts) else "messages"
        from vllm.exceptions import VLLMValidationError

        try:
            if isinstance(request.prompt, Texts):
                vllm_request, inputs = await self._texts(request, request.prompt)
            else:
                vllm_request, inputs = await self._chat(request, request.prompt)
        except BespokeError:
            raise
        except VLLMValidationError as error:
            if error.parameter in ("input_tokens", "input_text"):
                raise self._too_long(request, error.value, param) from error
            raise InvalidRequest(error.args[0], param, "invalid_value") from error
        except Exception as error:
            # A template refuses conversations that its model was not made for, each with an error of its own.
            log.info("request %s cannot be rendered", request.request_id, exc_info=True)
            raise InvalidRequest("The model's chat template refuses these messages.", param) from error
        if not inputs or not all(each["prompt_token_ids"] for each in inputs):
            raise InvalidRequest("The prompt is empty.", param, "invalid_value")
        return vllm_request, inputs, param

    def parser(self, rendered: Rendered) -> Any:
        """Makes one of vLLM's parsers for one choice; None if its text is the answer as it stands."""
        return upstream.make_parser(self._online, rendered.request, rendered.inputs[0]["prompt_token_ids"])

    async def _chat(self, request: GenerationRequest, messages: tuple[Message, ...]) -> tuple[Any, list[Any]]:
        make_request = upstream.counted_chat_request if request.count_only else upstream.chat_request
        vllm_request = make_request(
            messages=[_message(message) for message in messages],
            logprobs=request.sampling.logprobs is not None,
            top_logprobs=request.sampling.logprobs or 0,
            reasoning_effort=request.reasoning_effort,
            **self._tool_fields(request.toolbox),
            **_common(request),
        )
        result = await self._online.render_chat(vllm_request)
        if not isinstance(result, tuple):
            raise InvalidRequest(result.error.message, result.error.param, "invalid_value")
        upstream.bound_whitespace(vllm_request)
        return vllm_request, result[1]

    async def _texts(self, request: GenerationRequest, texts: Texts) -> tuple[Any, list[Any]]:
        vllm_request = upstream.completion_request(
            prompt=[text if isinstance(text, str) else list(text) for text in texts.prompts],
            logprobs=request.sampling.logprobs,
            echo=request.sampling.echo,
            **_common(request),
        )
        result = await self._online.render_completion(vllm_request)
        if not isinstance(result, list):
            raise InvalidRequest(result.error.message, result.error.param, "invalid_value")
        return vllm_request, result

    def _tool_fields(self, toolbox: Toolbox | None) -> dict[str, Any]:
        if toolbox is None:
            return {}
        if not self._has_tools and toolbox.choice != "none":
            raise InvalidRequest("This model does not support tools.", "tools", "unsupported_parameter")
        choice: Any = toolbox.choice
        if toolbox.function is not None:
            choice = {"type": "function", "function": {"name": toolbox.function}}
        # By default a call's arguments must follow their schema: small models need the grammar for it.
        functions = [
            {"name": tool.name, "description": tool.description, "strict": tool.strict is not False}
            | ({"parameters": json.loads(tool.parameters)} if tool.parameters else {})
            for tool in toolbox.tools
        ]
        tools = [{"type": "function", "function": function} for function in functions]
        return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": toolbox.parallel}

    def _params(self, request: GenerationRequest, vllm_request: Any, rendered: Any, param: str) -> Any:
        sampling = request.sampling
        prompt_tokens = len(rendered["prompt_token_ids"])
        available, requested = self._context(request) - prompt_tokens, sampling.completion_tokens_max
        if available < 1:
            raise self._too_long(request, prompt_tokens, param)
        try:
            # At most as many as the client asks for: a bound that the context cannot hold is no error. vLLM
            # generates at least one, which `OutputParser` leaves out for 0.
            most = available if requested is None else min(max(requested, 1), available)
            params = vllm_request.to_sampling_params(most, {})
            if sampling.logprobs is None and hasattr(vllm_request, "messages"):
                params.logprobs = None
            return params
        except Exception as error:
            if refusal := refusal_of(error):
                raise refusal from error
            raise

    def _context(self, request: GenerationRequest) -> int:
        return min(self.context_tokens_max, request.context_tokens_max or self.context_tokens_max)

    def _too_long(self, request: GenerationRequest, tokens: Any, param: str) -> ContextLengthExceeded:
        limit = self._context(request)
        count = tokens if isinstance(tokens, int) else limit + 1  # vLLM stops counting at its limit
        return ContextLengthExceeded(limit, count, 1, param)


def refusal_of(error: Exception) -> InvalidRequest | None:
    """Translates vLLM's refusal of a request into ours; None for any other error."""
    from vllm.exceptions import VLLMClientError

    if not isinstance(error, VLLMClientError | ValueError):
        return None
    text = str(error.args[0]) if error.args else "The model refuses this request."
    return InvalidRequest(text, getattr(error, "parameter", None), "invalid_value")


def _common(request: GenerationRequest) -> dict[str, Any]:
    """Returns the fields that vLLM's chat and completion requests share.

    They stream: outputs are then deltas.
    """
    sampling = request.sampling
    fields: dict[str, Any] = {
        "stream": True,
        "n": sampling.n,
        # vLLM refuses several greedy samples; its lowest temperature is as good as greedy.
        "temperature": max(sampling.temperature, 0.01) if sampling.n > 1 else sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "stop": list(sampling.stop),
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias} or None,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "cache_salt": request.cache_salt or None,
        "min_tokens": sampling.completion_tokens_min,
        "ignore_eos": sampling.ignore_eos,
        "stop_token_ids": list(sampling.stop_token_ids),
    }
    if sampling.text_format is not None:
        text = sampling.text_format
        fields["structured_outputs"] = (
            {"regex": text.regex} if text.regex is not None else {"choice": list(text.choices)}
        )
    if sampling.format is not None:
        schema = sampling.format.schema
        fields["response_format"] = (
            {"type": "json_object"}
            if schema is None
            else {"type": "json_schema", "json_schema": {"name": "answer", "schema": json.loads(schema)}}
        )
    return fields


def _message(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(arguments_of(call))},
            }
            for call in message.tool_calls
        ]
    return fields


def arguments_of(call: ToolCall) -> dict[str, Any]:
    """Returns an earlier call's arguments as chat templates take them: an object.

    Of arguments that were cut it is what they hold so far. Any other text is kept in an object of its own,
    where vLLM would leave it out.
    """
    text = call.arguments if call.arguments.strip() else "{}"
    for read in (json.loads, partial(pydantic_core.from_json, allow_partial="trailing-strings")):
        try:
            arguments = read(text)
            json.dumps(arguments)  # as a template will
        except (ValueError, RecursionError):
            continue
        if isinstance(arguments, dict):
            return arguments
    return {"INVALID_JSON": text}
