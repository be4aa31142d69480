"""A whole job on a tiny base: data in, a published adapter out."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.card import verify
from finetune.errors import BaseUnusable, DataUnreadable, GateFailed
from finetune.job import Job, JobResult, run
from finetune.recipe import Recipe
from tests.finetune.conftest import lesson, write_lines


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


def test_a_missing_base_or_data_file_is_told_before_anything_runs(
    job: Job, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(BaseUnusable):
        run(job, bases=tmp_path / "nowhere", adapters=tmp_path / "adapters")
    gone = job.model_copy(update={"data": tmp_path / "gone.jsonl"})
    with pytest.raises(DataUnreadable):
        run(gone, bases=tiny_base.parent, adapters=tmp_path / "adapters")
