"""Server-sent events, as far as OpenAI's streams use them.

html.spec.whatwg.org/multipage/server-sent-events.html
"""

from collections.abc import Iterable, Iterator

DONE = b"[DONE]"


def events(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The data of each event. An event that its blank line does not end is none; comments are skipped."""
    data: list[bytes] = []
    for line in lines:
        line = line.rstrip(b"\r\n")
        if not line:
            if data:
                yield b"\n".join(data)
            data = []
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
