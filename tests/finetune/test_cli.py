"""The commands print results on stdout, and an error as one line on stderr with status 1."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from finetune.card import AdapterCard, write_card
from finetune.cli import data_app, finetune_app
from finetune.recipe import Recipe
from tests.support.finetune_samples import card_for, lesson, staged_adapter, write_lines


@pytest.fixture
def cli() -> CliRunner:
    return CliRunner()


def test_checking_shows_each_fault_with_its_lines(cli: CliRunner, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [*lesson(30), "{", "["])
    result = cli.invoke(data_app, ["check", str(source)])
    assert result.exit_code == 0
    assert "broken_json" in result.stdout
    assert "31, 32" in result.stdout


def test_a_file_that_cannot_be_used_is_one_line_and_status_1(cli: CliRunner, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", lesson(3))
    for arguments in (["check", str(source)], ["prepare", str(source), "--out", str(tmp_path / "out")]):
        result = cli.invoke(data_app, arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_preparing_writes_the_three_files(cli: CliRunner, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", lesson(30))
    result = cli.invoke(data_app, ["prepare", str(source), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0
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
    result = cli.invoke(finetune_app, ["run", str(tmp_path / "job.yaml")], env={"BESPOKE_HOME": str(home)})
    assert result.exit_code == 0, result.output
    for phase in ("prepare", "train", "evaluate", "publish"):
        assert phase in result.stdout
    second = cli.invoke(finetune_app, ["run", str(tmp_path / "job.yaml"), "--home", str(home)])
    assert "reused, published before" in second.stdout


def test_a_bad_job_file_is_one_line_and_status_1(cli: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("tenant: UPPER")
    result = cli.invoke(finetune_app, ["run", str(tmp_path / "job.yaml")])
    assert result.exit_code == 1
    assert "tenant" in result.stderr
    assert result.stderr.count("\n") == 1


def test_showing_an_adapter_verifies_it_first(cli: CliRunner, tmp_path: Path) -> None:
    directory = staged_adapter(tmp_path / "adapter")
    write_card(directory, card_for(directory))
    shown = cli.invoke(finetune_app, ["show", str(directory)])
    assert shown.exit_code == 0
    assert "acme/support@" in shown.stdout
    (directory / "adapter_model.safetensors").write_bytes(b"changed")
    assert cli.invoke(finetune_app, ["show", str(directory)]).exit_code == 1


LONG = "n" * 63


@pytest.fixture
def long_names(tmp_path: Path) -> AdapterCard:
    """An adapter in `tmp_path / "adapter"` whose tenant, name and base are as long as names can be."""
    directory = staged_adapter(tmp_path / "adapter")
    card = card_for(directory, tenant=LONG, adapter=LONG, base=LONG)
    write_card(directory, card)
    return card


@pytest.mark.parametrize("columns", ["40", "80"])
def test_names_and_hashes_are_whole_in_a_narrow_terminal(
    cli: CliRunner, tmp_path: Path, long_names: AdapterCard, columns: str
) -> None:
    shown = cli.invoke(finetune_app, ["show", str(tmp_path / "adapter")], env={"COLUMNS": columns})
    assert shown.exit_code == 0
    assert f"{LONG}/{LONG}@{long_names.version}" in shown.stdout
    assert shown.stdout.splitlines()[1].split() == ["base", LONG]
    assert long_names.base_sha256 in shown.stdout


def test_prose_is_wrapped_at_the_width_of_the_terminal(
    cli: CliRunner, tmp_path: Path, long_names: AdapterCard
) -> None:
    shown = cli.invoke(finetune_app, ["show", str(tmp_path / "adapter")], env={"COLUMNS": "80"})
    assert all(len(line) <= 80 for line in shown.stdout.splitlines()[1:])


def test_showing_as_json_prints_the_card(cli: CliRunner, tmp_path: Path, long_names: AdapterCard) -> None:
    shown = cli.invoke(finetune_app, ["show", str(tmp_path / "adapter"), "--json"])
    assert json.loads(shown.stdout) == json.loads((tmp_path / "adapter" / "card.json").read_text())


def test_the_name_of_a_data_file_is_whole_in_a_narrow_terminal(cli: CliRunner, tmp_path: Path) -> None:
    source = write_lines(tmp_path / f"{LONG}-{LONG}.jsonl", [*lesson(30), '{"prompt": "Hi"}'])
    for arguments in (["check", str(source)], ["prepare", str(source), "--out", str(tmp_path / "out")]):
        result = cli.invoke(data_app, arguments, env={"COLUMNS": "40"})
        assert result.exit_code == 0
        assert f"{source.name}: 31 rows" in result.stdout
        assert "dropped: missing_messages" in result.stdout


def test_checking_and_preparing_as_json_print_the_report(cli: CliRunner, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [*lesson(30), "{"])
    out = tmp_path / "out"
    prepared = cli.invoke(data_app, ["prepare", str(source), "--out", str(out), "--json"])
    checked = cli.invoke(data_app, ["check", str(source), "--json"])
    assert prepared.stdout == checked.stdout == (out / "report.json").read_text()
    assert json.loads(checked.stdout)["dropped"] == {"broken_json": {"count": 1, "lines": [31]}}


def test_too_few_rows_as_json_are_reported_and_an_error(cli: CliRunner, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", lesson(3))
    result = cli.invoke(data_app, ["check", str(source), "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["rows"] == 3
    assert result.stderr.startswith("error: ")


def test_help_does_not_wait_for_torch() -> None:
    script = "import sys, finetune.cli, finetune.job; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
