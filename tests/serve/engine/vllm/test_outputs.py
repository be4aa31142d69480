"""Checks that answers hold no half characters, and that an end that is an error is a failure."""

from types import SimpleNamespace
from typing import Any

from serve.engine.protocol import Delta, Finished
from serve.engine.vllm.outputs import OutputParser

HALF = "\ud83d"


class Parser:
    """Stands in for vLLM's parser, which has read JSON that holds half a character."""

    def parse_delta(self, *_: Any, **__: Any) -> Any:
        function = SimpleNamespace(name=f"look{HALF}", arguments=f'"{HALF} é"')
        call = SimpleNamespace(index=0, id="call_1", function=function)
        return SimpleNamespace(content=f"well {HALF}", reasoning=f"so {HALF}", tool_calls=[call])


def read(reason: str, *, parser: Any = None, collect: bool = False) -> list[Any]:
    request = SimpleNamespace(parallel_tool_calls=None, tool_choice="auto")
    output_parser = OutputParser(
        None, [[1, 2]], request=request, samples=1, parser=lambda: parser, collect=collect, logprobs=None
    )
    completion = SimpleNamespace(
        index=0, text="x", token_ids=[1], logprobs=None, finish_reason=reason, stop_reason=None
    )
    output = SimpleNamespace(outputs=[completion], finished=True, prompt_logprobs=None, num_cached_tokens=0)
    return list(output_parser.read(0, output))


def test_half_a_character_in_what_a_parser_says_is_replaced() -> None:
    for collect in (True, False):
        delta, _ = read("stop", parser=Parser(), collect=collect)
        (call,) = delta.tool_calls
        assert (delta.text, delta.reasoning, call.arguments) == ("well ?", "so ?", '"? é"')
        assert call.name == "look?"


def test_an_end_that_vllm_calls_an_error_is_no_reason_but_a_failure() -> None:
    delta, finished = read("error")
    assert (delta, finished) == (Delta(0, "x", 1), Finished(2, 0, 1, aborted=False, failed=True))
