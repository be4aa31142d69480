"""Turns vLLM's outputs of one request into our events, as vLLM puts them into its queues.

Events carry text, tool calls, log-probabilities, and the counts that are billed. OutputParser translates
outputs and counts tokens. OutputHook calls it for each output.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from serve.engine.protocol import Delta, Event, Finished, Take, TokenLogprob
from serve.engine.vllm import upstream
from serve.engine.vllm.choices import ChoiceParser, Entries
from serve.engine.vllm.vocabulary import Vocabulary

_NO_REASON = ("abort", "error")  # vLLM's finish reasons that are no end of an answer
_LOGPROB_MIN = -9999.0  # JSON knows no infinity; vLLM's and OpenAI's floor


class OutputParser:
    """Translates the outputs of one request, of kind DELTA, and counts its tokens.

    `prompts` are token ids. `parser` makes one of vLLM's parsers for each choice, or None where the text is
    the answer as it stands. With `collect` each choice comes in one piece at its end. `echo` holds each
    prompt's text if the choices are to begin with it. `logprobs` is how many of the likeliest tokens come
    with each token: of those in the text, or with `all_tokens` of all. With `prompt_only` the answers are
    empty: what vLLM generates is left out.
    """

    def __init__(
        self,
        vocabulary: Vocabulary | None,
        prompts: Sequence[Sequence[int]],
        *,
        request: Any,
        samples: int,
        parser: Callable[[], Any],
        collect: bool,
        logprobs: int | None,
        echo: Sequence[str] = (),
        skip_special_tokens: bool = True,
        all_tokens: bool = False,
        prompt_only: bool = False,
    ) -> None:
        self.finished = False
        self.uncounted_tokens = 0  # generated for nobody
        self._prompt_only = prompt_only
        self._vocabulary = vocabulary
        self._skip_special_tokens = skip_special_tokens
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
        matches = logprobs is not None and not all_tokens
        self._choices = [
            ChoiceParser(index, parser(), request, prompts[0], collect=collect, matches=matches)
            for index in numbers
        ]

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
                entries = self._entries(self._prompts[part], self._prompt_logprobs[part])
                # A client may have sent half a character.
                text = self._echo[part].encode(errors="replace").decode()
                batch += choice.echo(text, entries)
            batch += self._read(choice, completion)
        if output.finished:
            self._unfinished -= 1
            if not self._unfinished:
                self.finished = True
                batch.append(Finished(*self.counts, self._aborted, self._failed))
        return batch

    def _read(self, choice: ChoiceParser, completion: Any) -> list[Delta]:
        reason = completion.finish_reason
        self._aborted = self._aborted or reason == "abort"
        self._failed = self._failed or reason == "error"
        reason = None if reason in _NO_REASON else reason
        if self._prompt_only:
            self.uncounted_tokens += len(completion.token_ids)
            return choice.take("", (), reason and "length")
        self._completion_tokens += len(completion.token_ids)
        return choice.take(
            completion.text,
            completion.token_ids,
            reason,
            self._entries(completion.token_ids, completion.logprobs),
            completion.stop_reason if isinstance(completion.stop_reason, str) else None,
        )

    def _entries(self, ids: Sequence[int], entries: Any) -> Entries:
        """Returns the log-probabilities of `ids`; nothing if the client did not ask for them."""
        if self._alternatives is None or entries is None:
            return ()
        return [self._entry(token, entry) for token, entry in zip(ids, entries, strict=True)]

    def _entry(self, token: int, entry: Any) -> tuple[TokenLogprob, bool]:
        """Returns a token's log-probability with the likeliest tokens, and whether the token has a text.

        `entry` is vLLM's: the token itself first, then the likeliest, each with its log-probability.
        """
        assert self._vocabulary is not None
        name = self._vocabulary.token
        has_text = not (self._skip_special_tokens and self._vocabulary.is_special(token))
        if not entry or token not in entry:
            return TokenLogprob(name(token), None), has_text
        ranked = sorted(entry.items(), key=lambda item: -item[1].logprob)[: self._alternatives]
        top = tuple((name(each), _floored(likely)) for each, likely in ranked)
        return TokenLogprob(name(token), _floored(entry[token]), top), has_text


def _floored(entry: Any) -> float:
    return max(float(entry.logprob), _LOGPROB_MIN)


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
