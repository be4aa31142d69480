"""Turns vLLM's outputs of one request into our events, as vLLM puts them into its queues.

Events carry text, tool calls, log-probabilities, and the counts that are billed. OutputParser translates
outputs and counts tokens. OutputHook calls it for each output.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from msgspec.structs import replace

from serve.engine.protocol import Delta, Event, Finished, Take, TokenLogprob, ToolCall
from serve.engine.vllm import upstream

_NO_REASON = ("abort", "error")  # vLLM's finish reasons that are no end of an answer
_LOGPROB_MIN = -9999.0  # JSON knows no infinity; vLLM's and OpenAI's floor


class OutputParser:
    """Translates the outputs of one request, of kind DELTA, and counts its tokens.

    `prompts` are token ids. `parser` makes one of vLLM's parsers for each choice, or None where the text is
    the answer as it stands. With `collect` each choice comes in one piece at its end. `echo` holds each
    prompt's text if the choices are to begin with it.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        request: Any,
        samples: int,
        parser: Callable[[], Any],
        collect: bool,
        logprobs: int | None,
        echo: Sequence[str] = (),
    ) -> None:
        self.finished = False
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._prompt_logprobs: list[Any] = [None] * len(prompts)
        self._prompt_tokens = sum(len(ids) for ids in prompts)
        self._cached_tokens = [0] * len(prompts)
        self._unfinished = len(prompts)
        self._samples = samples
        self._alternatives = logprobs  # to each token; None: no log-probabilities
        self._echo = echo
        self._completion_tokens = 0
        self._aborted = self._failed = False
        numbers = range(samples * len(prompts))
        self._choices = [_Choice(index, parser(), request, prompts[0], collect=collect) for index in numbers]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Returns prompt, cached and completion tokens until now."""
        cached = min(sum(self._cached_tokens), self._prompt_tokens)
        return self._prompt_tokens, cached, self._completion_tokens

    def read(self, part: int, output: Any) -> list[Event]:
        """Returns the events of one RequestOutput of prompt number `part`.

        The request's last one is Finished.
        """
        batch: list[Event] = []
        # vLLM sends it once for all samples of a prompt, with the first.
        self._prompt_logprobs[part] = self._prompt_logprobs[part] or output.prompt_logprobs
        self._cached_tokens[part] = max(self._cached_tokens[part], output.num_cached_tokens or 0)
        for completion in output.outputs:
            choice = self._choices[part * self._samples + completion.index]
            if not choice.begun and self._echo and completion.token_ids:
                batch.append(self._echoed(choice, part))
            count = len(completion.token_ids)
            self._completion_tokens += count
            reason = completion.finish_reason
            self._aborted = self._aborted or reason == "abort"
            self._failed = self._failed or reason == "error"
            logprobs = self._token_logprobs(completion.token_ids, completion.logprobs)
            end = None if reason in _NO_REASON else reason
            delta = choice.take(completion.text, completion.token_ids, end, logprobs)
            if isinstance(completion.stop_reason, str):
                delta = replace(delta, stop_sequence=completion.stop_reason)
            if delta.text or count or delta.finish_reason or delta.tool_calls or delta.reasoning:
                batch.append(delta)
        if output.finished:
            self._unfinished -= 1
            if not self._unfinished:
                self.finished = True
                batch.append(Finished(*self.counts, self._aborted, self._failed))
        return batch

    def _echoed(self, choice: "_Choice", part: int) -> Delta:
        choice.begun = True
        logprobs = self._token_logprobs(self._prompts[part], self._prompt_logprobs[part])
        text = self._echo[part].encode(errors="replace").decode()  # a client may have sent half a character
        return Delta(choice.index, text, 0, logprobs=logprobs)

    def _token_logprobs(self, ids: Sequence[int], entries: Any) -> tuple[TokenLogprob, ...]:
        """Returns the log-probabilities of `ids`; nothing if the client did not ask for them."""
        if self._alternatives is None or entries is None:
            return ()
        return tuple(self._token_logprob(token, entry) for token, entry in zip(ids, entries, strict=True))

    def _token_logprob(self, token: int, entry: Any) -> TokenLogprob:
        if not entry or token not in entry:
            return TokenLogprob(self._tokenizer.decode([token]), None)
        top = list(entry.items())[: self._alternatives]
        return TokenLogprob(
            self._text(token, entry[token]),
            max(float(entry[token].logprob), _LOGPROB_MIN),
            tuple((self._text(id, each), max(float(each.logprob), _LOGPROB_MIN)) for id, each in top),
        )

    def _text(self, token: int, entry: Any) -> str:
        text: str | None = entry.decoded_token
        return self._tokenizer.decode([token]) if text is None else text


class _Choice:
    """Parses one choice."""

    def __init__(
        self, index: int, parser: Any, request: Any, prompt: Sequence[int], *, collect: bool
    ) -> None:
        self.index = index
        self.begun = False
        self._parser = parser
        self._request = request
        self._prompt = list(prompt)
        self._collect = collect
        self._has_called = False
        self._text = ""
        self._ids: list[int] = []
        self._logprobs: tuple[TokenLogprob, ...] = ()

    def take(
        self, text: str, ids: Sequence[int], reason: str | None, logprobs: tuple[TokenLogprob, ...]
    ) -> Delta:
        self.begun = True
        if self._collect:
            return self._gather(text, ids, reason, logprobs)
        if self._parser is None:
            return Delta(self.index, text, len(ids), reason, logprobs=logprobs)
        parsed = self._parser.parse_delta(
            text, list(ids), self._request, self._prompt, finished=reason is not None
        )
        if parsed is None:
            return Delta(self.index, "", len(ids), self._reason(reason), logprobs=logprobs)
        calls = self._allowed(
            ToolCall(
                call.index,
                call.id,
                (_complete_characters(call.function.name) or None) if call.function else None,
                _complete_characters(call.function.arguments) if call.function else "",
            )
            for call in parsed.tool_calls
        )
        self._has_called = self._has_called or bool(calls)
        return Delta(
            self.index,
            _complete_characters(parsed.content),
            len(ids),
            self._reason(reason),
            reasoning=_complete_characters(parsed.reasoning),
            tool_calls=calls,
            logprobs=logprobs,
        )

    def _gather(
        self, text: str, ids: Sequence[int], reason: str | None, logprobs: tuple[TokenLogprob, ...]
    ) -> Delta:
        """Returns only the count, until the choice is complete and comes in one piece."""
        self._text += text
        self._ids += ids
        self._logprobs += logprobs
        if reason is None:
            return Delta(self.index, "", len(ids))
        if self._parser is None:
            return Delta(self.index, self._text, len(ids), reason, logprobs=self._logprobs)
        reasoning, content, parsed_calls = self._parser.parse(
            self._text, self._request, enable_auto_tools=True, model_output_token_ids=self._ids
        )
        calls = self._allowed(
            ToolCall(
                number,
                call.id or upstream.make_tool_call_id(),
                _complete_characters(call.name),
                _complete_characters(call.arguments),
            )
            for number, call in enumerate(parsed_calls or ())
        )
        self._has_called = bool(calls)
        return Delta(
            self.index,
            _complete_characters(content),
            len(ids),
            self._reason(reason),
            reasoning=_complete_characters(reasoning),
            tool_calls=calls,
            logprobs=self._logprobs,
        )

    def _allowed(self, calls: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
        several = self._request.parallel_tool_calls is not False
        return tuple(call for call in calls if several or call.index == 0)

    def _reason(self, reason: str | None) -> str | None:
        """Returns OpenAI's reason: tool_calls after calls that were not forced, else vLLM's."""
        forced = not isinstance(self._request.tool_choice, str | None)
        return "tool_calls" if reason == "stop" and self._has_called and not forced else reason


def _complete_characters(text: str | None) -> str:
    """Replaces half characters ("\\ud83d"), which a parser of JSON may produce and no frame can carry."""
    if not text or text.isascii():
        return text or ""
    return text.encode(errors="replace").decode()


class OutputHook:
    """Parses each output within vLLM's own call, and gives the events to `take`.

    `ended` is done after the last event, fails with what vLLM or the parsing raised, or is cancelled by the
    caller. Outputs that come after that are only counted.
    """

    def __init__(self, parser: OutputParser, take: Take) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parser = parser
        self._take = take

    def open(self, part: int, queue: Any) -> None:
        """Parses what is in the RequestOutputCollector of prompt number `part`, and each later output."""
        upstream.redirect_outputs(queue, partial(self._put, part))

    def _put(self, part: int, output: Any) -> None:
        # vLLM's caller serves all requests: nothing may be raised here.
        try:
            if isinstance(output, Exception):
                raise output
            batch = self._parser.read(part, output)
            if batch and not self.ended.done():
                self._take(batch)
        except Exception as error:
            if not self.ended.done():
                self.ended.set_exception(error)
            return
        if self._parser.finished and not self.ended.done():
            self.ended.set_result(None)
