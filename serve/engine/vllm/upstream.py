"""Holds every reach of the engine into vLLM's internal code; docs/upstream.md lists them all.

Each stands in a function of its own, with its reason and the place in vLLM 0.32. The test of the same name in
`tests/serve/engine/vllm/test_upstream.py` fails once vLLM changes there, or once the reach is not needed.
vLLM is imported inside functions: the gateway shares this package and must not load torch.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

# vLLM's core computes in its own process, as on a GPU. On CPUs vLLM turns "uni" into "mp"
# (platforms/cpu.py, check_and_update_config) and starts a worker process, because OpenMP's threads can only
# be set before a process starts. Core and worker would wait actively for each other: a core less to compute
# on. `prepare_environment` sets the threads before the core starts (docs/performance.md).
CPU_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


def start_llm(**arguments: Any) -> Any:
    """Starts an AsyncLLM with vLLM's engine `arguments`. Takes tens of seconds.

    AsyncLLM has no public name in 0.32 (`vllm.v1.engine.async_llm`).
    """
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)
    return AsyncLLM.from_vllm_config(config)


def pooler_config(pooling: str, *, normalized: bool) -> Any:
    """Returns vLLM's configuration of how a text's vector is made of its tokens' (config/pooler.py)."""
    from vllm.config import PoolerConfig

    return PoolerConfig(seq_pooling_type=pooling.upper(), use_activation=normalized)


def embedding_params() -> Any:
    """Returns vLLM's parameters of a request for a vector.

    They hold no `dimensions`: vLLM cuts vectors only of models that were made for it (pooling_params.py).
    """
    from vllm import PoolingParams

    return PoolingParams(task="embed")


def tokens_input(ids: Sequence[int]) -> Any:
    """Returns vLLM's own form of a rendered prompt of token ids (inputs/engine.py)."""
    from vllm.inputs.engine import tokens_input

    return tokens_input(list(ids))


def grammar_config(backend: str) -> Any:
    """Returns vLLM's configuration of grammars: the library `backend` for all, and no free whitespace.

    A small model may write free whitespace until its tokens are spent.
    """
    from vllm.config import StructuredOutputsConfig

    return StructuredOutputsConfig(backend=backend, disable_any_whitespace=True)


def grammar_tokenizer(llm: Any) -> str:
    """Returns xgrammar's description of the tokenizer as vLLM's core has it, as JSON.

    The core makes it in `v1/structured_output/backend_xgrammar.py`. Any compiled grammar knows it.
    """
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    config = llm.vllm_config
    backend = XgrammarBackend(
        config, tokenizer=llm.renderer.get_tokenizer(), vocab_size=config.model_config.get_vocab_size()
    )
    return str(backend.compiler.compile_grammar('root ::= "a"').tokenizer_info.serialize_json())


def grammar_of(params: Any) -> tuple[str, str] | None:
    """Returns the grammar that vLLM's core will compile for `params`, as its kind and its text.

    None without one. Of a choice of texts vLLM makes a grammar itself, after the gate has seen it
    (`v1/structured_output/backend_xgrammar.py`).
    """
    from vllm.v1.structured_output.request import get_structured_output_key
    from vllm.v1.structured_output.utils import choice_as_grammar

    outputs = params.structured_outputs
    if outputs is None or outputs.all_constraints_none():
        return None
    if outputs.choice is not None:
        return "grammar", choice_as_grammar(outputs.choice)
    kind, text = get_structured_output_key(outputs)
    return kind.name.lower(), text


def validate_grammars_without_compiling() -> None:
    """Spares vLLM's second validation of schemas and tags, in the event loop: half a second for some.

    The gate has compiled them (`grammar_gate`). Its check of the features that xgrammar drops stays
    (`v1/structured_output/backend_xgrammar.py`, `validate_xgrammar_grammar`).
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.structured_output import backend_xgrammar

    original = backend_xgrammar.validate_xgrammar_grammar
    if getattr(original, "bespoke_light", False):
        return

    def validate(params: Any) -> None:
        outputs = params.structured_outputs
        if outputs is None or not (outputs.json or outputs.structural_tag):
            original(params)
        elif outputs.json:
            schema = json.loads(outputs.json) if isinstance(outputs.json, str) else outputs.json
            if backend_xgrammar.has_xgrammar_unsupported_json_features(schema):
                raise VLLMValidationError("The schema holds what xgrammar does not support.")

    validate.bespoke_light = True  # type: ignore[attr-defined]
    backend_xgrammar.validate_xgrammar_grammar = validate


def bound_whitespace(request: Any) -> None:
    """Lets one space at most follow a comma in the JSON of tool calls.

    `disable_any_whitespace` does not reach structural tags, which vLLM makes for tool calls
    (entrypoints, `structured_outputs.structural_tag`). xgrammar reads `max_whitespace_cnt` in them.
    """
    outputs = request.structured_outputs
    if outputs is not None and outputs.structural_tag is not None:
        tag = json.loads(outputs.structural_tag)
        _bound_whitespace_in(tag)
        outputs.structural_tag = json.dumps(tag)


def _bound_whitespace_in(tag: Any) -> None:
    if isinstance(tag, dict):
        if tag.get("type") == "json_schema" and "json_schema" in tag:
            tag["max_whitespace_cnt"] = 1
            return
        for part in tag.values():
            _bound_whitespace_in(part)
    elif isinstance(tag, list):
        for part in tag:
            _bound_whitespace_in(part)


def make_renderer(llm: Any, *, tool_parser: str | None, reasoning_parser: str | None) -> Any:
    """Makes the renderer of vLLM's own server, without the server.

    Chat templates, tools and structured output are then exactly vLLM's (renderers/online_renderer.py).
    """
    from vllm.renderers.online_renderer import OnlineRenderer

    return OnlineRenderer(
        llm.model_config,
        llm.renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        enable_auto_tools=tool_parser is not None,
        exclude_tools_when_tool_choice_none=True,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
    )


def make_parser(renderer: Any, request: Any, prompt: Sequence[int]) -> Any:
    """Makes one of vLLM's parsers for one choice; None if its text is the answer as it stands.

    `renderer` is `make_renderer`'s, `request` vLLM's own, `prompt` token ids. Without the prompt's ids a
    parser streams tool calls as text (parser/abstract_parser.py).
    """
    kind = renderer.parser
    if kind is None or not hasattr(request, "messages"):
        return None
    if kind.reasoning_parser_cls is None and not (request.tools and request.tool_choice != "none"):
        return None
    parser = kind(
        renderer.renderer.get_tokenizer(),
        request.tools,
        chat_template_kwargs=renderer.effective_chat_template_kwargs(request),
        model_config=renderer.model_config,
    )
    parser.set_prompt_token_ids(prompt)
    return parser


def chat_request(**fields: Any) -> Any:
    """Makes vLLM's chat request, for its renderer (entrypoints/openai/chat_completion/protocol.py)."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return ChatCompletionRequest(**fields)


def counted_chat_request(**fields: Any) -> Any:
    """Makes a chat request that vLLM tokenizes to its end, also where the context is shorter.

    vLLM's own refuses such a prompt without its count (renderers/params.py). The body's size bounds it.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    class CountedRequest(ChatCompletionRequest):  # type: ignore[misc] # vLLM is not typed
        def build_tok_params(self, model_config: Any) -> Any:
            return replace(super().build_tok_params(model_config), max_total_tokens=None)

    return CountedRequest(**fields)


def completion_request(**fields: Any) -> Any:
    """Makes vLLM's completion request (entrypoints/openai/completion/protocol.py)."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    return CompletionRequest(**fields)


def make_tool_call_id() -> str:
    """Names a tool call as vLLM's streaming parsers do, where its one-shot parser gives no name."""
    from vllm.renderers import chat_utils

    return str(chat_utils.make_tool_call_id())


def redirect_outputs(queue: Any, put: Callable[[Any], None]) -> None:
    """Gives `put` what is in a request's queue, and from then on each output as vLLM produces it.

    `queue` is the RequestOutputCollector that `AsyncLLM.add_request` returns (v1/engine/output_processor.py).
    vLLM calls its `put` for each step. Waking a task that waits in its `get` would cost more than reading
    an output does.
    """
    early, queue.output = queue.output, None
    queue.put = put
    if early is not None:
        put(early)


async def abort(llm: Any, queues: Iterable[Any]) -> None:
    """Ends the requests of `queues` in vLLM by its own internal names.

    By our names vLLM keeps for good what several samples of a request share
    (v1/engine/output_processor.py, `parent_requests`). What it has counted is left in the queues.
    """
    await llm.abort([queue.request_id for queue in queues], internal=True)


def read_variables_once() -> None:
    """Makes vLLM keep its environment variables, several of which it looks up for every token (envs.py).

    For a replica's process, once its engine runs.
    """
    from vllm.envs import enable_envs_cache

    enable_envs_cache()
