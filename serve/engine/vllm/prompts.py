"""From a request to what vLLM computes: prompt tokens and sampling parameters.

The chat template, tools and structured output are vLLM's own code (`vllm.renderers`), which knows the formats
of the models; here is only the translation of our typed request into vLLM's and of its refusals into ours.
vLLM is imported inside functions: the gateway shares this package and must not load torch.
"""

import json
import logging
from dataclasses import dataclass
from typing import Any

from serve.engine.protocol import GenerationRequest, Message, Texts, Toolbox
from serve.engine.vllm.grammars import check_grammars
from serve.errors import BespokeError, ContextLengthExceeded, InvalidRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rendered:
    """What vLLM gets: an input and parameters for each prompt; `request` is the whole in vLLM's own form."""

    request: Any
    inputs: list[Any]
    params: list[Any]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(each["prompt_token_ids"]) for each in self.inputs)


class PromptRenderer:
    """Renders for one AsyncLLM. The parsers are names of vLLM's, or None where the base has none."""

    def __init__(self, llm: Any, *, tool_parser: str | None, reasoning_parser: str | None) -> None:
        from vllm.renderers.online_renderer import OnlineRenderer

        self._config = llm.model_config
        self._tools = tool_parser is not None
        self._online = OnlineRenderer(
            llm.model_config,
            llm.renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
            enable_auto_tools=self._tools,
            exclude_tools_when_tool_choice_none=True,
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
        )

    @property
    def context_tokens_max(self) -> int:
        return int(self._config.max_model_len)

    @property
    def tokenizer(self) -> Any:
        return self._online.renderer.get_tokenizer()

    async def render(self, request: GenerationRequest) -> Rendered:
        """Raises InvalidRequest, ContextLengthExceeded."""
        check_grammars(request)
        where = "prompt" if isinstance(request.prompt, Texts) else "messages"
        from vllm.exceptions import VLLMValidationError

        try:
            if isinstance(request.prompt, Texts):
                asked, inputs = await self._texts(request, request.prompt)
            else:
                asked, inputs = await self._chat(request, request.prompt)
        except BespokeError:
            raise
        except VLLMValidationError as error:
            if error.parameter in ("input_tokens", "input_text"):
                raise self._too_long(request, error.value, where) from error
            raise InvalidRequest(error.args[0], where, "invalid_value") from error
        except Exception as error:
            # A template refuses conversations that its model was not made for, each with an error of its own.
            log.info("request %s cannot be rendered", request.request_id, exc_info=True)
            raise InvalidRequest("The model's chat template refuses these messages.", where) from error
        if not inputs or not all(each["prompt_token_ids"] for each in inputs):
            raise InvalidRequest("The prompt is empty.", where, "invalid_value")
        return Rendered(asked, inputs, [self._params(request, asked, each, where) for each in inputs])

    def parser(self, rendered: Rendered) -> Any:
        """A new parser of vLLM's for one choice; None if its text is the answer as it stands."""
        made, asked = self._online.parser, rendered.request
        plain = made is None or not hasattr(asked, "messages")
        if plain or (made.reasoning_parser_cls is None and not (asked.tools and asked.tool_choice != "none")):
            return None
        kwargs = self._online.effective_chat_template_kwargs(asked)
        parser = made(self.tokenizer, asked.tools, chat_template_kwargs=kwargs, model_config=self._config)
        parser.set_prompt_token_ids(rendered.inputs[0]["prompt_token_ids"])
        return parser

    async def _chat(self, request: GenerationRequest, messages: tuple[Message, ...]) -> tuple[Any, list[Any]]:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        asked = ChatCompletionRequest(
            messages=[_message(message) for message in messages],
            logprobs=request.sampling.logprobs is not None,
            top_logprobs=request.sampling.logprobs or 0,
            reasoning_effort=request.reasoning_effort,
            **self._tools_of(request.toolbox),
            **_common(request),
        )
        result = await self._online.render_chat(asked)
        if not isinstance(result, tuple):
            raise InvalidRequest(result.error.message, result.error.param, "invalid_value")
        if asked.structured_outputs is not None and asked.structured_outputs.structural_tag is not None:
            tag = json.loads(asked.structured_outputs.structural_tag)
            _bound_whitespace(tag)
            asked.structured_outputs.structural_tag = json.dumps(tag)
        return asked, result[1]

    async def _texts(self, request: GenerationRequest, texts: Texts) -> tuple[Any, list[Any]]:
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        asked = CompletionRequest(
            prompt=[text if isinstance(text, str) else list(text) for text in texts.prompts],
            logprobs=request.sampling.logprobs,
            echo=request.sampling.echo,
            **_common(request),
        )
        result = await self._online.render_completion(asked)
        if not isinstance(result, list):
            raise InvalidRequest(result.error.message, result.error.param, "invalid_value")
        return asked, result

    def _tools_of(self, toolbox: Toolbox | None) -> dict[str, Any]:
        if toolbox is None:
            return {}
        if not self._tools and toolbox.choice != "none":
            raise InvalidRequest("This model does not support tools.", "tools", "unsupported_parameter")
        choice: Any = toolbox.choice
        if toolbox.function is not None:
            choice = {"type": "function", "function": {"name": toolbox.function}}
        # Unless told otherwise a call's arguments follow their schema: small models need the grammar for it.
        functions = [
            {"name": tool.name, "description": tool.description, "strict": tool.strict is not False}
            | ({"parameters": json.loads(tool.parameters)} if tool.parameters else {})
            for tool in toolbox.tools
        ]
        tools = [{"type": "function", "function": function} for function in functions]
        return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": toolbox.parallel}

    def _params(self, request: GenerationRequest, asked: Any, rendered: Any, where: str) -> Any:
        sampling = request.sampling
        prompt_tokens = len(rendered["prompt_token_ids"])
        room, wanted = self._context(request) - prompt_tokens, sampling.completion_tokens_max
        if room < (wanted or 1):
            where = request.length_param if wanted and room > 0 else where
            raise self._too_long(request, prompt_tokens, where)
        try:
            params = asked.to_sampling_params(wanted or room, {})
            if sampling.logprobs is None and hasattr(asked, "messages"):
                params.logprobs = None
            return params
        except Exception as error:
            if refusal := refusal_of(error):
                raise refusal from error
            raise

    def _context(self, request: GenerationRequest) -> int:
        return min(self.context_tokens_max, request.context_tokens_max or self.context_tokens_max)

    def _too_long(self, request: GenerationRequest, tokens: Any, where: str) -> ContextLengthExceeded:
        limit = self._context(request)
        count = tokens if isinstance(tokens, int) else limit + 1  # vLLM stops counting where it is too much
        return ContextLengthExceeded(limit, count, request.sampling.completion_tokens_max or 1, where)


def refusal_of(error: Exception) -> InvalidRequest | None:
    """vLLM's refusal of a request in our terms; None if it is none."""
    from vllm.exceptions import VLLMClientError

    if not isinstance(error, VLLMClientError | ValueError):
        return None
    text = str(error.args[0]) if error.args else "The model refuses this request."
    return InvalidRequest(text, getattr(error, "parameter", None), "invalid_value")


def _common(request: GenerationRequest) -> dict[str, Any]:
    """The fields that vLLM's chat and completion requests share. Streamed: then outputs are deltas."""
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
    }
    if sampling.format is not None:
        schema = sampling.format.schema
        fields["response_format"] = (
            {"type": "json_object"}
            if schema is None
            else {"type": "json_schema", "json_schema": {"name": "answer", "schema": json.loads(schema)}}
        )
    return fields


def _bound_whitespace(tag: Any) -> None:
    """In tool calls too (see `pin_grammars`): one space may follow a comma, and no more."""
    if isinstance(tag, dict):
        if tag.get("type") == "json_schema" and "json_schema" in tag:
            tag["max_whitespace_cnt"] = 1
            return
        for part in tag.values():
            _bound_whitespace(part)
    elif isinstance(tag, list):
        for part in tag:
            _bound_whitespace(part)


def _message(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return fields
