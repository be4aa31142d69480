"""The commands: tables and times on success, one line and status 1 on what went wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from finetune.card import write_card
from finetune.cli import data_app, finetune_app
from finetune.recipe import Recipe
from tests.finetune.conftest import card_for, lesson, staged_adapter, write_lines


@pytest.fixture
def cli() -> CliRunner:
    return CliRunner()


def test_checking_shows_each_fault_with_its_lines(cli: CliRunner, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [*lesson(30), "{", "["])
    done = cli.invoke(data_app, ["check", str(source)])
    assert done.exit_code == 0
    assert "broken_json" in done.stdout
    assert "31, 32" in done.stdout


def test_a_file_that_cannot_be_used_is_one_line_and_status_1(cli: CliRunner, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", lesson(3))
    for arguments in (["check", str(source)], ["prepare", str(source), "--out", str(tmp_path / "out")]):
        done = cli.invoke(data_app, arguments)
        assert done.exit_code == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_preparing_writes_the_three_files(cli: CliRunner, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", lesson(30))
    done = cli.invoke(data_app, ["prepare", str(source), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_job_runs_from_its_file_and_is_reused(
    cli: CliRunner, tiny_base: Path, tmp_path: Path, recipe: Recipe
) -> None:
    write_lines(tmp_path / "rows.jsonl", lesson(60))
    job = {"tenant": "acme", "adapter": "support", "base": "tiny", "data": "rows.jsonl"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job | {"recipe": recipe.to_dict()}))
    home = tmp_path / "home"
    home.mkdir()
    (home / "bases").symlink_to(tiny_base.parent)
    done = cli.invoke(finetune_app, ["run", str(tmp_path / "job.yaml")], env={"BESPOKE_HOME": str(home)})
    assert done.exit_code == 0, done.output
    for phase in ("prepare", "train", "evaluate", "publish"):
        assert phase in done.stdout
    again = cli.invoke(finetune_app, ["run", str(tmp_path / "job.yaml"), "--home", str(home)])
    assert "reused, published before" in again.stdout


def test_a_bad_job_file_is_one_line_and_status_1(cli: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("tenant: UPPER")
    done = cli.invoke(finetune_app, ["run", str(tmp_path / "job.yaml")])
    assert done.exit_code == 1
    assert "tenant" in done.stderr
    assert done.stderr.count("\n") == 1


def test_showing_an_adapter_verifies_it_first(cli: CliRunner, tmp_path: Path) -> None:
    directory = staged_adapter(tmp_path / "adapter")
    write_card(directory, card_for(directory))
    shown = cli.invoke(finetune_app, ["show", str(directory)])
    assert shown.exit_code == 0
    assert "acme/support@" in shown.stdout
    (directory / "adapter_model.safetensors").write_bytes(b"changed")
    assert cli.invoke(finetune_app, ["show", str(directory)]).exit_code == 1


def test_help_does_not_wait_for_torch() -> None:
    script = "import sys, finetune.cli, finetune.job; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
