"""A job turns data into a published adapter on a tiny base, and is read from a YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune.card import verify
from finetune.errors import BaseUnusable, ConfigInvalid, DataUnreadable, GateFailed
from finetune.job import Job, JobResult, load_job, run
from finetune.recipe import Recipe
from tests.support.finetune_samples import lesson, write_lines

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def job(tmp_path: Path, recipe: Recipe) -> Job:
    data = write_lines(tmp_path / "rows.jsonl", [*lesson(60), "{"])
    return Job(tenant="acme", adapter="support", base="tiny", data=data, recipe=recipe)


@pytest.fixture
def result(job: Job, tiny_base: Path, tmp_path: Path) -> JobResult:
    return run(job, bases=tiny_base.parent, adapters=tmp_path / "adapters")


def test_a_job_publishes_an_adapter_that_beats_its_base(result: JobResult, tmp_path: Path) -> None:
    card = verify(result.directory)
    assert card == result.card
    assert result.directory == tmp_path / "adapters" / "acme" / "support" / card.version
    assert card.gate.passed
    assert card.metrics.difference_ci95[1] < 0
    assert card.metrics.adapter_nll < card.metrics.base_nll
    assert (card.data.train_rows, card.data.heldout_rows, card.data.dropped) == (51, 9, {"broken_json": 1})
    assert list(result.phase_s) == ["prepare", "train", "evaluate", "publish"]


def test_the_same_job_again_is_reused_and_forced_it_gives_the_same_version(
    result: JobResult, job: Job, tiny_base: Path, tmp_path: Path
) -> None:
    again = run(job, bases=tiny_base.parent, adapters=tmp_path / "adapters")
    assert again.reused
    assert again.directory == result.directory
    phases: list[str] = []
    forced = run(
        job, bases=tiny_base.parent, adapters=tmp_path / "adapters", force=True, on_phase=phases.append
    )
    assert not forced.reused
    assert phases == ["prepare", "train", "evaluate", "publish"]
    assert forced.directory == result.directory


def test_an_adapter_that_learned_nothing_is_not_published(job: Job, tiny_base: Path, tmp_path: Path) -> None:
    idle = job.model_copy(update={"recipe": job.recipe.model_copy(update={"learning_rate": 1e-30})})
    with pytest.raises(GateFailed):
        run(idle, bases=tiny_base.parent, adapters=tmp_path / "adapters")
    assert not (tmp_path / "adapters").exists()


def test_a_missing_base_or_data_file_is_reported_before_anything_runs(
    job: Job, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(BaseUnusable):
        run(job, bases=tmp_path / "nowhere", adapters=tmp_path / "adapters")
    missing = job.model_copy(update={"data": tmp_path / "gone.jsonl"})
    with pytest.raises(DataUnreadable):
        run(missing, bases=tiny_base.parent, adapters=tmp_path / "adapters")


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


def test_problems_of_a_job_and_of_its_recipe_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("{tenant: ../acme, adapter: support, data: 3, recipe: missing.yaml}")
    with pytest.raises(ConfigInvalid) as caught:
        load_job(path)
    message = str(caught.value)
    for field in ("tenant", "base", "data", "recipe missing.yaml"):
        assert field in message
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("tenant", ["lumen-bikes", "tidewater-tea"])
def test_the_demo_jobs_load_and_say_how_to_run_them(tenant: str) -> None:
    path = CONFIGS / "demo" / f"{tenant}.yaml"
    job = load_job(path)
    assert (job.tenant, job.adapter, job.base) == (tenant, "support", "smollm2-135m")
    assert job.data.is_file()
    assert path.read_text().startswith(f"# bespoke finetune run configs/demo/{tenant}.yaml\n")
