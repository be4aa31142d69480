"""Checks the places in vLLM that `serve.engine.vllm.upstream` relies on.

A test that fails here after an upgrade names a reach to look at again; docs/upstream.md says how. No engine
is started: `test_engine.py` and `test_vllm_issues.py` prove the same in a running one.
"""

import inspect
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

from serve.engine.vllm import upstream
from serve.engine.vllm.counters import READ

pytest.importorskip("vllm")


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_the_executor_is_still_there_and_vllm_still_prefers_a_worker_process_on_cpus() -> None:
    from vllm.platforms import cpu
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.executor.abstract import Executor

    assert issubclass(resolve_obj_by_qualname(upstream.CPU_EXECUTOR), Executor)
    source = inspect.getsource(cpu.CpuPlatform.check_and_update_config)
    assert 'distributed_executor_backend = "mp"' in source, "vLLM computes in its core by itself now"


def test_an_llm_is_still_made_of_a_checked_configuration() -> None:
    from vllm.engine import arg_utils
    from vllm.v1.engine.async_llm import AsyncLLM

    # By its source: bitsandbytes' plugin puts a wrapper of any arguments in its place when it is loaded.
    assert re.search(r"def create_engine_config\(\s*self,\s*usage_context", inspect.getsource(arg_utils))
    assert "vllm_config" in parameters(AsyncLLM.from_vllm_config)
    assert {"prompt", "params", "lora_request", "trace_headers"} <= parameters(AsyncLLM.add_request)


def test_xgrammar_still_reads_the_bound_on_whitespace_in_structural_tags() -> None:
    import xgrammar

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}}
    request = SimpleNamespace(structured_outputs=SimpleNamespace(structural_tag=json.dumps(tag)))
    upstream.bound_whitespace(request)
    bounded = request.structured_outputs.structural_tag
    assert json.loads(bounded)["format"]["max_whitespace_cnt"] == 1
    free, ours = (str(xgrammar.Grammar.from_structural_tag(text)) for text in (json.dumps(tag), bounded))
    assert free != ours


def test_a_request_without_a_structural_tag_is_left_as_it_is() -> None:
    for outputs in (None, SimpleNamespace(structural_tag=None)):
        request = SimpleNamespace(structured_outputs=outputs)
        upstream.bound_whitespace(request)
        assert request.structured_outputs is outputs


def test_vllms_renderer_still_takes_and_gives_what_we_use() -> None:
    from vllm.renderers.online_renderer import OnlineRenderer

    assert {
        *("request_logger", "chat_template", "chat_template_content_format", "enable_auto_tools"),
        *("exclude_tools_when_tool_choice_none", "tool_parser", "reasoning_parser"),
    } <= parameters(OnlineRenderer)
    for method in ("render_chat", "render_completion", "effective_chat_template_kwargs"):
        assert callable(getattr(OnlineRenderer, method))
    assert "self.parser:" in inspect.getsource(OnlineRenderer.__init__)


def test_vllms_parsers_still_take_and_give_what_we_use() -> None:
    from vllm.parser.abstract_parser import DelegatingParser, Parser

    assert hasattr(Parser, "reasoning_parser_cls")
    assert callable(DelegatingParser.set_prompt_token_ids)
    assert parameters(Parser.parse_delta) == {
        *("self", "delta_text", "delta_token_ids", "request", "prompt_token_ids", "finished")
    }
    assert parameters(Parser.parse) == {
        *("self", "model_output", "request", "enable_auto_tools", "model_output_token_ids")
    }


def test_vllms_requests_are_made_of_openais_fields() -> None:
    chat = upstream.chat_request(messages=[{"role": "user", "content": "x"}], cache_salt="s", stream=True)
    assert (chat.cache_salt, chat.structured_outputs) == ("s", None)
    text = upstream.completion_request(prompt=["x"], stream=True, echo=True)
    for request in (chat, text):
        assert parameters(request.to_sampling_params) == {"max_tokens", "default_sampling_params"}
    assert upstream.make_tool_call_id().startswith("chatcmpl-tool-")


def test_a_prompt_is_still_bounded_by_the_parameters_that_we_replace() -> None:
    config = SimpleNamespace(max_model_len=8)
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
    bounded, counted = upstream.chat_request(**fields), upstream.counted_chat_request(**fields)
    assert bounded.build_tok_params(config).max_input_tokens == 8
    assert counted.build_tok_params(config).max_input_tokens is None


def test_vllms_queue_is_still_written_by_its_put_and_read_at_its_output() -> None:
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import output_processor

    queue = output_processor.RequestOutputCollector(RequestOutputKind.DELTA, "internal-1")
    early, later = RuntimeError("early"), RuntimeError("later")
    queue.put(early)
    outputs: list[Any] = []
    upstream.redirect_outputs(queue, outputs.append)
    assert queue.output is None
    queue.put(later)
    assert outputs == [early, later]
    assert queue.get_nowait() is None
    assert queue.request_id == "internal-1"
    queue.close()
    source = inspect.getsource(output_processor.OutputProcessor)
    assert "req_state.queue.put(request_output)" in source, "vLLM hands outputs over in another way now"


def test_vllm_still_tells_its_own_names_of_requests_from_ours() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert inspect.signature(AsyncLLM.abort).parameters["internal"].default is False


def test_vllm_still_reads_its_variables_anew_until_told_to_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    assert callable(envs.enable_envs_cache)
    if envs._is_envs_cache_enabled():
        pytest.skip("an engine of this process keeps them already")
    values = []
    for value in ("INFO", "ERROR"):
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", value)
        values.append(envs.VLLM_LOGGING_LEVEL)
    assert values == ["INFO", "ERROR"], "vLLM keeps them by itself now"


def test_vllm_still_knows_the_variables_that_we_set() -> None:
    from vllm import envs

    names = {"VLLM_NO_USAGE_STATS", "VLLM_HOST_IP", "VLLM_RPC_BASE_PATH", "VLLM_LOGGING_LEVEL"}
    assert names | {"VLLM_CPU_KVCACHE_SPACE"} <= set(envs.environment_variables)


def test_vllm_still_counts_under_the_names_that_we_read() -> None:
    from vllm.v1.metrics import loggers

    source = inspect.getsource(loggers)
    assert [name for name in READ if f'"{name.removesuffix("_total")}"' not in source] == []


def test_vllm_still_names_a_requests_grammar_by_kind_and_text() -> None:
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.structured_output.backend_types import StructuredOutputOptions

    def grammar(**constraint: Any) -> tuple[str, str] | None:
        return upstream.grammar_of(SamplingParams(structured_outputs=StructuredOutputsParams(**constraint)))

    assert upstream.grammar_of(SamplingParams()) is None
    assert grammar(json='{"type": "object"}') == ("json", '{"type": "object"}')
    assert grammar(json_object=True) == ("json_object", "")
    assert grammar(choice=["a", "b"]) == ("grammar", 'root ::= "a" | "b"')
    # `grammar_worker` compiles each of the others.
    kinds = {option.name.lower() for option in StructuredOutputOptions}
    assert kinds == {"json", "json_object", "regex", "grammar", "choice", "structural_tag"}


def test_vllm_still_validates_grammars_where_its_compilation_is_spared() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.structured_output import backend_xgrammar

    upstream.validate_grammars_without_compiling()
    caller = inspect.getsource(SamplingParams._validate_structured_outputs)
    assert "import validate_xgrammar_grammar" in caller

    def validate(schema: dict[str, Any]) -> None:
        params = SamplingParams(structured_outputs=StructuredOutputsParams(json=schema))
        backend_xgrammar.validate_xgrammar_grammar(params)

    validate({"type": "string", "pattern": "(("})  # the gate has refused it
    with pytest.raises(VLLMValidationError):
        validate({"type": "string", "pattern": "^a$", "maxLength": 3})
