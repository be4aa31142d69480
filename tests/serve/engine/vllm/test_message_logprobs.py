"""The tokens told are exactly the message: bytes joined, whatever is cut, kept back or left out."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from serve.engine.protocol import TokenLogprob
from serve.engine.vllm.logprobs import MessageLogprobs, size_of

WORDS = st.text(st.sampled_from("ab <é漢😀"), min_size=1, max_size=12)


def cut(raw: bytes, cuts: set[int]) -> list[bytes]:
    ends = [0, *sorted(each for each in cuts if 0 < each < len(raw)), len(raw)]
    return [raw[start:end] for start, end in itertools.pairwise(ends)]


def decoded(tokens: list[TokenLogprob]) -> str:
    return b"".join(each.token for each in tokens).decode(errors="replace")


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[tuple[bytes, bool]], str]:
    """Tokens, each with whether it has a text, and their text; the last may end within a character."""
    raw = draw(WORDS).encode() + draw(st.sampled_from([b"", b"\xf0\x9f", b" \xe6"]))
    pieces = cut(raw, draw(st.sets(st.integers(1, 40))))
    tokens: list[tuple[bytes, bool]] = []
    for piece in pieces:
        if draw(st.booleans()):
            tokens.append((b"<|im_start|>", False))
        tokens.append((piece, True))
    return [*tokens, (b"<|im_end|>", False)], raw.decode(errors="ignore")


@given(answers(), st.integers(0, 4), st.integers(0, 20), st.data())
def test_the_tokens_told_are_the_message(
    answer: tuple[list[tuple[bytes, bool]], str], kept_back: int, end: int, data: st.DataObject
) -> None:
    """vLLM sends text late, and drops the end of it where a stop sequence begins, also within a token."""
    tokens, text = answer
    message = text[:end]
    logprobs, told, sent, raw = MessageLogprobs(), list[TokenLogprob](), 0, b""
    for number, (token, has_text) in enumerate(tokens):
        raw += token if has_text else b""
        come = raw.decode(errors="ignore")
        upto = min(len(come) - kept_back, len(message))
        if number == len(tokens) - 1:
            upto = len(message)
        piece = message[sent : max(sent, upto)]
        logprobs.add(piece, [(TokenLogprob(token, -1.0), has_text)])
        told += logprobs.take(piece) if piece else []
        sent = max(sent, upto)
        assert message.startswith(decoded(told).rstrip("\ufffd"))
    told += logprobs.cut()
    assert b"".join(each.token for each in told) == message.encode()


@given(st.binary(max_size=12))
def test_bytes_are_counted_by_the_characters_they_decode_to(raw: bytes) -> None:
    text = raw.decode(errors="replace")
    for count in range(len(text) + 1):
        assert raw[: size_of(raw, count)].decode(errors="replace") == text[:count]


def test_what_is_no_message_is_not_told() -> None:
    logprobs = MessageLogprobs()
    pieces = [b"<th", b"ink>a b", b"</think>a", b" b\n<tool", b"_call>{}"]
    logprobs.add(b"".join(pieces).decode(), [(TokenLogprob(piece, -1.0), True) for piece in pieces])
    logprobs.skip("a b")
    assert decoded([*logprobs.take("a b"), *logprobs.cut()]) == "a b"
    assert [*logprobs.cut()] == []
