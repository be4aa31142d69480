"""A recipe is validated as a whole, and identified by its hash."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune.errors import ConfigInvalid
from finetune.recipe import Recipe, load_recipe


def test_every_problem_of_a_recipe_is_reported_together(tmp_path: Path, recipe: Recipe) -> None:
    value = recipe.to_dict() | {"rank": 0, "learning_rate": "fast", "colour": "red"}
    del value["epochs"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(value))
    with pytest.raises(ConfigInvalid) as caught:
        load_recipe(path)
    assert sorted(problem.partition(":")[0] for problem in caught.value.problems) == [
        "colour",
        "epochs",
        "learning_rate",
        "rank",
    ]
    assert str(caught.value).count("\n") == 0


def test_the_same_recipe_has_the_same_hash_and_another_has_not(recipe: Recipe) -> None:
    assert recipe.sha256 == Recipe.model_validate(recipe.to_dict()).sha256
    assert recipe.sha256 != recipe.model_copy(update={"seed": 8}).sha256
