"""The reader of event streams."""

from hypothesis import given
from hypothesis import strategies as st

from loadtests.load.sse import events


def test_an_event_is_its_data() -> None:
    assert list(events([b'data: {"a": 1}\n', b"\n", b"data: [DONE]\n", b"\n"])) == [b'{"a": 1}', b"[DONE]"]


def test_comments_other_fields_and_carriage_returns_are_no_data() -> None:
    lines = [
        b": ping\r\n",
        b"\r\n",
        b"event: x\r\n",
        b"id: 7\r\n",
        b"data:one\r\n",
        b"data: two\r\n",
        b"\r\n",
    ]
    assert list(events(lines)) == [b"one\ntwo"]


def test_an_event_that_its_blank_line_does_not_end_is_none() -> None:
    assert list(events([b"data: whole\n", b"\n", b"data: cut\n"])) == [b"whole"]


@given(st.lists(st.text(st.characters(exclude_characters="\r\n"), max_size=20).map(str.encode), max_size=8))
def test_what_is_sent_is_what_is_read(sent: list[bytes]) -> None:
    lines = [line for data in sent for line in (b"data: " + data + b"\n", b"\n")]
    assert list(events(lines)) == sent
