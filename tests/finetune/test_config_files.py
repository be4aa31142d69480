"""A configuration file is a small YAML mapping, or it is refused with every problem."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config_files import parse, read_yaml
from finetune.errors import ConfigInvalid
from finetune.recipe import Recipe


@pytest.mark.parametrize("text", ["- a\n- b\n", "{", "", "x" * 100_000, "!!python/object:os.system {}"])
def test_what_is_not_a_small_yaml_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigInvalid):
        read_yaml(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="No such file"):
        read_yaml(tmp_path / "absent.yaml")


def test_every_wrong_field_is_named(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse(Recipe, recipe.to_dict() | {"rank": 0, "colour": "red"}, tmp_path / "config.yaml")
    assert sorted(problem.partition(":")[0] for problem in caught.value.problems) == ["colour", "rank"]
