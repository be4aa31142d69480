"""Matches the tokens of one choice with its message, so that the tokens told are exactly the message.

The bytes of the tokens told, joined and decoded, are the message. So a special token, half a character at the
end, a stop sequence and the text of a tool call are not told, and a token of which only a part is in the
message is told as that part. OpenAI's rule: platform.openai.com/docs/api-reference/chat/object, "bytes".
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from serve.engine.protocol import TokenLogprob


@dataclass(slots=True)
class _Pending:
    entry: TokenLogprob
    rest: bytes  # not yet seen in the text
    told: bytes = b""  # in the message


class MessageLogprobs:
    """Holds the tokens whose text is not in the message yet.

    vLLM sends the text of a token later than the token while a character is incomplete or a stop sequence may
    follow.
    """

    def __init__(self) -> None:
        self._tokens: deque[_Pending] = deque()
        self._text = ""  # of `_tokens`, as far as vLLM has sent it

    def add(self, text: str, entries: Iterable[tuple[TokenLogprob, bool]]) -> None:
        """Adds vLLM's next text and its next tokens. Each comes with whether it has a text."""
        self._text += text
        self._tokens.extend(_Pending(entry, entry.token if visible else b"") for entry, visible in entries)

    def skip(self, text: str) -> None:
        """Passes over the next `text`, which is in another part of the answer, such as its reasoning."""
        for _ in (*self._find(text), *self._pass(len(text), told=False)):
            pass

    def take(self, text: str) -> Iterator[TokenLogprob]:
        """Yields the tokens that end in the message's next `text`."""
        yield from self._find(text)
        yield from self._pass(len(text), told=True)

    def cut(self) -> Iterator[TokenLogprob]:
        """Yields the token of which a part is in the message, where the message ends or breaks off."""
        if self._tokens and (told := self._tokens[0].told):
            yield replace(self._tokens[0].entry, token=told)
            self._tokens[0].told = b""

    def _find(self, text: str) -> Iterator[TokenLogprob]:
        """Passes over what is before the next `text`: the markup of a tool call, white space."""
        yield from self._pass(max(0, self._text.find(text)), told=False)

    def _pass(self, characters: int, *, told: bool) -> Iterator[TokenLogprob]:
        self._text = self._text[characters:]
        size = size_of(b"".join(token.rest for token in self._tokens), characters)
        while self._tokens and (size or not self._tokens[0].rest):
            token = self._tokens[0]
            part, token.rest = token.rest[:size], token.rest[size:]
            size -= len(part)
            if told:
                token.told += part
            if not token.rest:
                yield from self.cut()
                self._tokens.popleft()


def size_of(raw: bytes, characters: int) -> int:
    """Returns how many bytes of `raw` its first characters take. Bytes that are none decode to U+FFFD."""
    if raw.isascii():
        return min(characters, len(raw))
    size = 0
    while characters and size < len(raw):
        invalid = 0
        try:
            text = raw[size:].decode()
        except UnicodeDecodeError as error:
            text = raw[size : size + error.start].decode()
            invalid = error.end - error.start
        if characters <= len(text):
            return size + len(text[:characters].encode())
        size += len(text.encode()) + invalid
        characters -= len(text) + (invalid > 0)
    return size
