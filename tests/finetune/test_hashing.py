"""Equal bytes and equal JSON values have equal hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from finetune.hashing import file_sha256, json_sha256


def test_a_file_is_hashed_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"weights")
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"weights").hexdigest()


def test_the_order_of_keys_does_not_change_a_hash() -> None:
    assert json_sha256({"a": 1, "b": "ü"}) == json_sha256({"b": "ü", "a": 1})
    assert json_sha256({"a": 1, "b": "ü"}) == hashlib.sha256('{"a":1,"b":"ü"}'.encode()).hexdigest()
    assert json_sha256([1, 2]) != json_sha256([2, 1])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_lacks_has_no_hash(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        json_sha256({"loss": number})
