"""Reads server-sent events, as far as OpenAI's streams use them.

html.spec.whatwg.org/multipage/server-sent-events.html
"""

from collections.abc import Iterable, Iterator

DONE = b"[DONE]"


def events(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the data of each event. Comments are skipped, and so is an event without its blank line."""
    data: list[bytes] = []
    for line in lines:
        line = line.rstrip(b"\r\n")
        if not line:
            if data:
                yield b"\n".join(data)
            data = []
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
