"""Runs one fine-tuning job: prepare, train, evaluate, and publish the adapter if it passes the gate."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from finetune.base_model import base_sha256
from finetune.card import (
    ADAPTER_CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterCard,
    Data,
    Gate,
    Libraries,
    Metrics,
    Name,
    content_version,
)
from finetune.config_files import parse, read_yaml
from finetune.data.data_report import DataReport
from finetune.data.prepare import HELDOUT_NAME, TRAIN_NAME, prepare
from finetune.errors import ConfigInvalid, DataUnreadable
from finetune.hashing import file_sha256
from finetune.publish import find_published, publish
from finetune.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from finetune.train.loop import OnStep

OnPhase = Callable[[str], None]


class Job(BaseModel):
    """The contents of a job file. Once loaded, `data` is absolute or relative to the working directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant: Name
    adapter: Name
    base: Name
    data: Path
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class JobResult:
    """The published adapter of a job, with its report and the seconds of each phase in order.

    `reused` is true if an identical adapter was already published. Then nothing ran: there is no report, and
    `phase_s` is empty.
    """

    card: AdapterCard
    directory: Path
    reused: bool
    report: DataReport | None = None
    phase_s: dict[str, float] = field(default_factory=dict)


def load_job(path: Path) -> Job:
    """Loads a job from YAML. The paths `data` and `recipe` are relative to the file; a recipe may be inline.

    Raises:
        ConfigInvalid: with every problem of the job and of its recipe.
    """
    value = read_yaml(path)
    problems: tuple[str, ...] = ()
    if isinstance(value.get("data"), str):
        value["data"] = path.parent / value["data"]
    if isinstance(value.get("recipe"), str):
        try:
            value["recipe"] = load_recipe(path.parent / value["recipe"])
        except ConfigInvalid as error:
            problems = tuple(f"recipe {value.pop('recipe')}: {problem}" for problem in error.problems)
    try:
        return parse(Job, value, path)
    except ConfigInvalid as error:
        # Without its unreadable recipe the job lacks one; the recipe's own problems say more.
        others = (problem for problem in error.problems if not (problems and problem.startswith("recipe:")))
        raise ConfigInvalid(path, (*others, *problems)) from error


def run(
    job: Job,
    *,
    bases: Path,
    adapters: Path,
    force: bool = False,
    on_phase: OnPhase | None = None,
    on_step: OnStep | None = None,
) -> JobResult:
    """Runs a job and publishes its adapter under `adapters`, or reuses the one it published before.

    The same data, recipe and base give the same bytes on the same machine, so nothing is trained twice;
    `force` trains all the same. Prepared data and staged weights are in a private temporary folder, which is
    removed at the end and after every error.

    Raises:
        FinetuneError: any branch of it; after GateFailed nothing was published.
    """
    base_dir = bases / job.base
    base_digest = base_sha256(base_dir)
    if not force and (published := _published(job, adapters, base_digest)):
        return JobResult(published, adapters / job.tenant / job.adapter / published.version, reused=True)

    # Imported here because they load torch, for which neither a configuration error nor a reuse should wait.
    from finetune.evaluate.gate import decide
    from finetune.evaluate.metrics import evaluate
    from finetune.train.loop import train

    timer = _PhaseTimer(on_phase)
    with tempfile.TemporaryDirectory(prefix="bespoke-finetune-") as scratch:
        data, staging = Path(scratch, "data"), Path(scratch, "adapter")
        with timer.phase("prepare"):
            report = prepare(
                job.data, data, heldout_fraction=job.recipe.heldout_fraction, seed=job.recipe.seed
            )
        with timer.phase("train"):
            training = train(
                base_dir, data / TRAIN_NAME, staging, base=job.base, recipe=job.recipe, on_step=on_step
            )
        with timer.phase("evaluate"):
            metrics = evaluate(
                base_dir,
                staging,
                data / HELDOUT_NAME,
                max_length_tokens=job.recipe.max_length_tokens,
                seed=job.recipe.seed,
            )
        with timer.phase("publish"):
            too_long = training.rows_too_long + report.heldout - metrics.heldout_rows
            training_data = Data(
                source_sha256=report.source_sha256,
                train_rows=training.rows,
                heldout_rows=metrics.heldout_rows,
                dropped={**report.dropped_counts, **({"too_many_tokens": too_long} if too_long else {})},
                trained_tokens=training.tokens,
            )
            card = _card(job, staging, base_digest, training_data, metrics, decide(metrics))
            directory = publish(staging, adapters, card)
    return JobResult(card, directory, reused=False, report=report, phase_s=timer.phase_s)


def _published(job: Job, adapters: Path, base_digest: str) -> AdapterCard | None:
    try:
        data_digest = file_sha256(job.data)
    except OSError as error:
        raise DataUnreadable(job.data, error.strerror or "cannot be read") from error
    return find_published(
        adapters,
        job.tenant,
        job.adapter,
        data_sha256=data_digest,
        config_sha256=job.recipe.sha256,
        base_sha256=base_digest,
    )


def _card(job: Job, staging: Path, base_digest: str, data: Data, metrics: Metrics, gate: Gate) -> AdapterCard:
    return AdapterCard(
        tenant=job.tenant,
        adapter=job.adapter,
        version=content_version(staging),
        base=job.base,
        base_sha256=base_digest,
        rank=job.recipe.rank,
        target_modules=tuple(sorted(job.recipe.target_modules)),
        data=data,
        config=job.recipe.to_dict(),
        config_sha256=job.recipe.sha256,
        weights_sha256=file_sha256(staging / WEIGHTS_NAME),
        adapter_config_sha256=file_sha256(staging / ADAPTER_CONFIG_NAME),
        seed=job.recipe.seed,
        libraries=Libraries(
            torch=version("torch"), transformers=version("transformers"), peft=version("peft")
        ),
        metrics=metrics,
        gate=gate,
        created_at=datetime.now(UTC),
    )


class _PhaseTimer:
    """Measures the wall seconds of each phase, and reports its name as it begins."""

    def __init__(self, on_phase: OnPhase | None) -> None:
        self.phase_s: dict[str, float] = {}
        self._on_phase = on_phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._on_phase:
            self._on_phase(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.phase_s[name] = time.perf_counter() - started
