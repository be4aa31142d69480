"""From vLLM's outputs to our events: text, tool calls, log-probabilities, and the counts that are billed.

vLLM's outputs of one request, read in the moment in which vLLM puts them into its queues.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from msgspec.structs import replace

from serve.engine.protocol import Delta, Event, Finished, Take, TokenLogprob, ToolCall
from serve.engine.vllm import upstream

_NO_REASON = ("abort", "error")  # vLLM's for an end that is no answer's
_LOGPROB_MIN = -9999.0  # JSON knows no infinity; vLLM's and OpenAI's floor


class OutputParser:
    """Reads the outputs of one request, of kind DELTA, and counts as it goes.

    `prompts` are token ids. `parser` makes one of vLLM's parsers for each choice, or None where the text is
    the answer as it stands. `echo` holds each prompt's text if the choices are to begin with it.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        request: Any,
        samples: int,
        parser: Callable[[], Any],
        whole: bool,
        logprobs: int | None,
        echo: Sequence[str] = (),
    ) -> None:
        self.finished = False
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._prompted: list[Any] = [None] * len(prompts)
        self._prompt_tokens = sum(len(ids) for ids in prompts)
        self._cached = [0] * len(prompts)
        self._left = len(prompts)
        self._samples = samples
        self._logprobs = logprobs
        self._echo = echo
        self._completion_tokens = 0
        self._aborted = self._failed = False
        numbers = range(samples * len(prompts))
        self._choices = [_Choice(index, parser(), request, prompts[0], whole=whole) for index in numbers]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Prompt, cached and completion tokens until now."""
        cached = min(sum(self._cached), self._prompt_tokens)
        return self._prompt_tokens, cached, self._completion_tokens

    def read(self, part: int, output: Any) -> list[Event]:
        """The events in one RequestOutput of the prompt number `part`; the very last one is Finished."""
        batch: list[Event] = []
        # Told once for all samples of a prompt, whichever comes first.
        self._prompted[part] = self._prompted[part] or output.prompt_logprobs
        self._cached[part] = max(self._cached[part], output.num_cached_tokens or 0)
        for one in output.outputs:
            choice = self._choices[part * self._samples + one.index]
            if not choice.begun and self._echo and one.token_ids:
                batch.append(self._echoed(choice, part))
            count = len(one.token_ids)
            self._completion_tokens += count
            reason = one.finish_reason
            self._aborted = self._aborted or reason == "abort"
            self._failed = self._failed or reason == "error"
            told = self._told(one.token_ids, one.logprobs)
            delta = choice.take(one.text, one.token_ids, None if reason in _NO_REASON else reason, told)
            if isinstance(one.stop_reason, str):
                delta = replace(delta, stop_sequence=one.stop_reason)
            if delta.text or count or delta.finish_reason or delta.tool_calls or delta.reasoning:
                batch.append(delta)
        if output.finished:
            self._left -= 1
            if not self._left:
                self.finished = True
                batch.append(Finished(*self.counts, self._aborted, self._failed))
        return batch

    def _echoed(self, choice: "_Choice", part: int) -> Delta:
        choice.begun = True
        told = self._told(self._prompts[part], self._prompted[part])
        text = self._echo[part].encode(errors="replace").decode()  # a client may have sent half a character
        return Delta(choice.index, text, 0, logprobs=told)

    def _told(self, ids: Sequence[int], found: Any) -> tuple[TokenLogprob, ...]:
        """What is told of each token: nothing if nobody asked."""
        if self._logprobs is None or found is None:
            return ()
        return tuple(self._one(token, entry) for token, entry in zip(ids, found, strict=True))

    def _one(self, token: int, entry: Any) -> TokenLogprob:
        if not entry or token not in entry:
            return TokenLogprob(self._tokenizer.decode([token]), None)
        top = list(entry.items())[: self._logprobs]
        return TokenLogprob(
            self._text(token, entry[token]),
            max(float(entry[token].logprob), _LOGPROB_MIN),
            tuple((self._text(other, one), max(float(one.logprob), _LOGPROB_MIN)) for other, one in top),
        )

    def _text(self, token: int, entry: Any) -> str:
        text: str | None = entry.decoded_token
        return self._tokenizer.decode([token]) if text is None else text


class _Choice:
    """One choice on its way through its parser."""

    def __init__(self, index: int, parser: Any, request: Any, prompt: Sequence[int], *, whole: bool) -> None:
        self.index = index
        self.begun = False
        self._parser = parser
        self._request = request
        self._prompt = list(prompt)
        self._whole = whole
        self._called = False
        self._text = ""
        self._ids: list[int] = []
        self._told: tuple[TokenLogprob, ...] = ()

    def take(
        self, text: str, ids: Sequence[int], reason: str | None, told: tuple[TokenLogprob, ...]
    ) -> Delta:
        self.begun = True
        if self._whole:
            return self._gather(text, ids, reason, told)
        if self._parser is None:
            return Delta(self.index, text, len(ids), reason, logprobs=told)
        parsed = self._parser.parse_delta(
            text, list(ids), self._request, self._prompt, finished=reason is not None
        )
        if parsed is None:
            return Delta(self.index, "", len(ids), self._reason(reason), logprobs=told)
        calls = self._allowed(
            ToolCall(
                call.index,
                call.id,
                (_whole(call.function.name) or None) if call.function else None,
                _whole(call.function.arguments) if call.function else "",
            )
            for call in parsed.tool_calls
        )
        self._called = self._called or bool(calls)
        return Delta(
            self.index,
            _whole(parsed.content),
            len(ids),
            self._reason(reason),
            reasoning=_whole(parsed.reasoning),
            tool_calls=calls,
            logprobs=told,
        )

    def _gather(
        self, text: str, ids: Sequence[int], reason: str | None, told: tuple[TokenLogprob, ...]
    ) -> Delta:
        """Nothing but the count, until the choice is complete and comes in one piece."""
        self._text += text
        self._ids += ids
        self._told += told
        if reason is None:
            return Delta(self.index, "", len(ids))
        if self._parser is None:
            return Delta(self.index, self._text, len(ids), reason, logprobs=self._told)
        reasoning, content, found = self._parser.parse(
            self._text, self._request, enable_auto_tools=True, model_output_token_ids=self._ids
        )
        calls = self._allowed(
            ToolCall(
                number, call.id or upstream.make_tool_call_id(), _whole(call.name), _whole(call.arguments)
            )
            for number, call in enumerate(found or ())
        )
        self._called = bool(calls)
        return Delta(
            self.index,
            _whole(content),
            len(ids),
            self._reason(reason),
            reasoning=_whole(reasoning),
            tool_calls=calls,
            logprobs=self._told,
        )

    def _allowed(self, calls: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
        several = self._request.parallel_tool_calls is not False
        return tuple(call for call in calls if several or call.index == 0)

    def _reason(self, reason: str | None) -> str | None:
        """OpenAI's: an answer that calls tools unforced ends with tool_calls, a forced one with stop."""
        forced = not isinstance(self._request.tool_choice, str | None)
        return "tool_calls" if reason == "stop" and self._called and not forced else reason


def _whole(text: str | None) -> str:
    """A parser that has read JSON may hold half a character ("\\ud83d"), which no frame can carry."""
    if not text or text.isascii():
        return text or ""
    return text.encode(errors="replace").decode()


class OutputHook:
    """Takes the place of a task that waits for each output: waking it would cost more than reading does.

    `take` gets the events until `ended` is done: with None after the last one, with what vLLM or the reading
    raised, or cancelled. What comes after that is only counted.
    """

    def __init__(self, reader: OutputParser, take: Take) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = reader
        self._take = take

    def open(self, part: int, queue: Any) -> None:
        """Read the RequestOutputCollector of the prompt number `part`, from what is in it already on."""
        upstream.redirect_outputs(queue, partial(self._put, part))

    def _put(self, part: int, output: Any) -> None:
        # vLLM's caller serves all requests: nothing may be raised here.
        try:
            if isinstance(output, Exception):
                raise output
            batch = self._reader.read(part, output)
            if batch and not self.ended.done():
                self._take(batch)
        except Exception as error:
            if not self.ended.done():
                self.ended.set_exception(error)
            return
        if self._reader.finished and not self.ended.done():
            self.ended.set_result(None)
