"""A base in the list of models was created when it was imported."""

from datetime import UTC, datetime
from pathlib import Path

from quantize.card import BaseCard, write_card
from tests.serve.conftest import TINY
from tests.support.scripted_app import HELLO, ScriptedApp

IMPORTED = datetime(2026, 3, 1, tzinfo=UTC)
COUNTS = ("parameters", "vocab_size", "hidden_size", "layers", "max_context_tokens", "bytes_on_disk")


def test_a_base_was_created_when_it_was_imported(tmp_path: Path) -> None:
    card = BaseCard(
        name=TINY,
        source="here",
        licence="MIT",
        architecture="LlamaForCausalLM",
        **dict.fromkeys(COUNTS, 1),
        scheme="bfloat16",
        recipe_sha256="0" * 64,
        weights_sha256="0" * 64,
        files_sha256={},
        libraries={},
        created_at=IMPORTED,
    )
    directory = tmp_path / "bases" / TINY
    directory.mkdir(parents=True)
    write_card(directory, card)
    app = ScriptedApp(tmp_path, HELLO)
    listed = app.ask("GET", "/v1/models").json()["data"]
    assert [(model["id"], model["created"]) for model in listed] == [(TINY, int(IMPORTED.timestamp()))]
    assert app.ask("GET", f"/v1/models/{TINY}").json() == listed[0]


def test_a_base_without_a_card_is_listed_all_the_same(tmp_path: Path) -> None:
    (listed,) = ScriptedApp(tmp_path, HELLO).ask("GET", "/v1/models").json()["data"]
    assert (listed["id"], listed["created"]) == (TINY, 0)
