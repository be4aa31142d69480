"""A configuration file is right, or all that is wrong with it is told at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune.errors import ConfigInvalid
from finetune.job import load_job
from finetune.recipe import Recipe, load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"


def test_every_problem_of_a_recipe_is_told_together(tmp_path: Path, recipe: Recipe) -> None:
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


@pytest.mark.parametrize("text", ["- a\n- b\n", "{", "", "x" * 100_000, "!!python/object:os.system {}"])
def test_what_is_not_a_small_yaml_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigInvalid):
        load_recipe(path)


def test_a_job_finds_its_data_and_recipe_beside_itself(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/r.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    path = tmp_path / "job.yaml"
    path.write_text("{tenant: acme, adapter: support, base: tiny, data: rows.jsonl, recipe: recipes/r.yaml}")
    job = load_job(path)
    assert job.data == tmp_path / "rows.jsonl"
    assert job.recipe == recipe


def test_a_recipe_may_be_written_inline(tmp_path: Path, recipe: Recipe) -> None:
    job = {"tenant": "acme", "adapter": "support", "base": "tiny", "data": "/rows.jsonl"}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job | {"recipe": recipe.to_dict()}))
    assert load_job(path).recipe == recipe
    assert load_job(path).data == Path("/rows.jsonl")


def test_problems_of_a_job_and_of_its_recipe_are_told_together(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("{tenant: ../acme, adapter: support, data: 3, recipe: missing.yaml}")
    with pytest.raises(ConfigInvalid) as caught:
        load_job(path)
    told = str(caught.value)
    for field in ("tenant", "base", "data", "recipe missing.yaml"):
        assert field in told
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("tenant", ["lumen-bikes", "tidewater-tea"])
def test_the_demo_jobs_load_and_say_how_to_run_them(tenant: str) -> None:
    path = CONFIGS / "demo" / f"{tenant}.yaml"
    job = load_job(path)
    assert (job.tenant, job.adapter, job.base) == (tenant, "support", "smollm2-135m")
    assert job.data.is_file()
    assert path.read_text().startswith(f"# bespoke finetune run configs/demo/{tenant}.yaml\n")


def test_the_same_recipe_has_the_same_hash_and_another_has_not(recipe: Recipe) -> None:
    assert recipe.sha256 == Recipe.model_validate(recipe.to_dict()).sha256
    assert recipe.sha256 != recipe.model_copy(update={"seed": 8}).sha256
