"""The held-out side never shares a question with training."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from finetune.data.clean import comparable
from finetune.data.dataset import Conversation, Message
from finetune.data.split import split

QUESTIONS = st.lists(
    st.sampled_from(["Open?", "open", "OPEN !", "Cost?", "Name?", "Where?"]) | st.text(min_size=1)
)


def rows(questions: list[str]) -> list[Conversation]:
    return [
        Conversation((Message("user", question), Message("assistant", f"Answer {number}.")), number)
        for number, question in enumerate(questions, start=1)
    ]


@given(QUESTIONS, st.floats(0.05, 0.5), st.integers(0, 2**32 - 1))
def test_no_question_is_on_both_sides_and_no_row_is_lost(
    questions: list[str], fraction: float, seed: int
) -> None:
    sides = split(rows(questions), fraction=fraction, seed=seed)
    trained = {comparable(row.question) for row in sides.train}
    assert trained.isdisjoint(comparable(row.question) for row in sides.heldout)
    assert sorted(row.line for row in sides.train + sides.heldout) == list(range(1, len(questions) + 1))


@given(QUESTIONS, st.randoms())
def test_the_split_does_not_depend_on_the_order_of_the_file(questions: list[str], random: object) -> None:
    conversations = rows(questions)
    shuffled = list(conversations)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert split(conversations, fraction=0.3, seed=1) == split(shuffled, fraction=0.3, seed=1)


def test_the_held_out_side_has_its_share() -> None:
    sides = split(rows([f"Question {number}" for number in range(100)]), fraction=0.15, seed=0)
    assert (len(sides.train), len(sides.heldout)) == (85, 15)


def test_a_question_with_many_rows_stays_in_training() -> None:
    sides = split(rows(["Name?"] * 50 + [f"Question {number}" for number in range(50)]), fraction=0.1, seed=0)
    assert len(sides.heldout) == 10
    assert all(row.question != "Name?" for row in sides.heldout)


def test_another_seed_holds_out_other_questions() -> None:
    conversations = rows([f"Question {number}" for number in range(100)])
    assert split(conversations, fraction=0.2, seed=0) != split(conversations, fraction=0.2, seed=1)
