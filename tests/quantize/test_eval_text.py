"""An evaluation text is bounded, named and hashed."""

import hashlib
from pathlib import Path

import pytest

from quantize import eval_text
from quantize.errors import TextMissing, TextTooLarge
from quantize.eval_text import STDLIB_TEXT, load_eval_text


def test_the_default_text_is_prose_that_every_python_has() -> None:
    loaded = load_eval_text(STDLIB_TEXT)
    assert loaded.name == STDLIB_TEXT
    assert len(loaded.content.split()) > 50_000
    assert loaded == load_eval_text(STDLIB_TEXT)


def test_a_file_is_named_without_its_folders_and_hashed(tmp_path: Path) -> None:
    path = tmp_path / "prose.txt"
    path.write_text("Grüße.", encoding="utf-8")
    loaded = load_eval_text(str(path))
    assert (loaded.name, loaded.content) == ("prose.txt", "Grüße.")
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_text_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"\xe9")
    for source in (tmp_path / "absent.txt", tmp_path, tmp_path / "latin1.txt"):
        with pytest.raises(TextMissing):
            load_eval_text(str(source))


def test_a_text_beyond_the_bound_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_text, "TEXT_BYTES_MAX", 3)
    (tmp_path / "long.txt").write_text("long")
    with pytest.raises(TextTooLarge):
        load_eval_text(str(tmp_path / "long.txt"))
