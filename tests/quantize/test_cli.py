"""The commands print results on stdout, and an error as one line on stderr with status 1."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer import Typer
from typer.testing import CliRunner, Result

from quantize.card import CARD, QuantizationReport, read_card, write_card
from quantize.cli import base_app, quantize_app
from quantize.config import BaseConfig, QuantizeConfig

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = str(CONFIGS / "bases" / "tiny.yaml")
NF4 = str(CONFIGS / "quantize" / "nf4.yaml")

runner = CliRunner()


@pytest.fixture
def home(tiny: Path, tmp_path: Path) -> Path:
    """A home whose only base is the tiny one."""
    (tmp_path / "home" / "bases").mkdir(parents=True)
    (tmp_path / "home" / "bases" / "tiny").symlink_to(tiny)
    return tmp_path / "home"


def config_file(folder: Path, nf4_config: QuantizeConfig, limit: float) -> str:
    """Writes the quick settings with another limit, and returns the file's path."""
    settings = nf4_config.model_dump() | {"gate": {"perplexity_ratio_max": limit}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "config.yaml")


def show(app: Typer, *arguments: str, home: Path, columns: int = 80) -> Result:
    """Runs a command in a terminal of that width."""
    return runner.invoke(app, [*arguments, "--home", str(home)], env={"COLUMNS": str(columns)})


def test_import_then_show(tiny_config: BaseConfig, tmp_path: Path) -> None:
    imported = runner.invoke(base_app, ["import", TINY], env={"BESPOKE_HOME": str(tmp_path)})
    assert imported.exit_code == 0, imported.output
    shown = runner.invoke(base_app, ["show", "tiny", "--home", str(tmp_path)])
    assert shown.exit_code == 0
    assert "tiny: intact" in shown.output
    assert read_card(tmp_path / "bases" / "tiny").weights_sha256[:32] in shown.output


def test_run_then_report(home: Path, nf4_config: QuantizeConfig, tmp_path: Path) -> None:
    text = tmp_path / "prose.txt"
    text.write_text("Real prose is better than this line, but it is quick. " * 400)
    quick = config_file(tmp_path, nf4_config, limit=1.35)
    ran = runner.invoke(
        quantize_app, ["run", quick, "--base", "tiny", "--text", str(text), "--home", str(home)]
    )
    assert ran.exit_code == 0, ran.output
    assert "tiny-nf4 is in" in ran.output
    reported = runner.invoke(quantize_app, ["report", "tiny-nf4", "--home", str(home)])
    assert "prose.txt: 248 tokens" in reported.output
    assert "passed" in reported.output


def test_a_failed_gate_prints_its_measurements_and_fails(
    home: Path, nf4_config: QuantizeConfig, tmp_path: Path
) -> None:
    strict = config_file(tmp_path, nf4_config, limit=0.5)
    ran = runner.invoke(quantize_app, ["run", strict, "--base", "tiny", "--home", str(home)])
    assert ran.exit_code == 1
    assert "Perplexity ratio" in ran.stdout
    assert "error: tiny-nf4 is not published" in ran.stderr.splitlines()[-1]
    reported = runner.invoke(quantize_app, ["report", "tiny-nf4", "--home", str(home)])
    assert "FAILED" in reported.output


@pytest.mark.parametrize(
    "arguments",
    [["show", "absent"], ["show", "../etc"], ["import", NF4]],
    ids=["unknown", "path-like", "wrong kind of file"],
)
def test_errors_of_base_are_one_line_on_stderr(arguments: list[str], tmp_path: Path) -> None:
    result = runner.invoke(base_app, [*arguments, "--home", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.fixture
def long_names(tiny: Path, report: QuantizationReport, tmp_path: Path) -> tuple[str, str, Path]:
    """The longest name that a base can have, its parent's, and a home that holds both bases."""
    name, parent = f"{'n' * 60}-nf4", "p" * 64
    for directory in (parent, name):
        shutil.copytree(tiny, tmp_path / "bases" / directory)
    card = read_card(tiny).model_copy(update={"name": parent})
    write_card(tmp_path / "bases" / parent, card)
    lineage = {
        "name": name,
        "scheme": "bnb-nf4",
        "parent": parent,
        "parent_sha256": "0" * 64,
        "report": report,
    }
    write_card(tmp_path / "bases" / name, card.model_copy(update={"name": name} | lineage))
    return name, parent, tmp_path


@pytest.mark.parametrize("columns", [40, 80])
def test_names_and_hashes_are_whole_in_a_narrow_terminal(
    long_names: tuple[str, str, Path], columns: int
) -> None:
    name, parent, home = long_names
    shown = show(base_app, "show", name, home=home, columns=columns)
    assert shown.exit_code == 0, shown.output
    card = read_card(home / "bases" / name)
    for value in (name, parent, card.weights_sha256, card.recipe_sha256, "0" * 64):
        assert value in shown.stdout
    reported = show(quantize_app, "report", name, home=home, columns=columns)
    assert reported.exit_code == 0, reported.output
    assert name in reported.stdout
    assert parent in reported.stdout


def test_prose_is_wrapped_at_the_width_of_the_terminal(long_names: tuple[str, str, Path]) -> None:
    name, _, home = long_names
    for shown in (show(base_app, "show", name, home=home), show(quantize_app, "report", name, home=home)):
        too_long = [line for line in shown.stdout.splitlines() if len(line) > 80]
        assert all(max(map(len, line.split())) >= 60 for line in too_long)


def test_showing_as_json_prints_the_card(long_names: tuple[str, str, Path]) -> None:
    name, _, home = long_names
    shown = show(base_app, "show", name, "--json", home=home)
    assert json.loads(shown.stdout) == json.loads((home / "bases" / name / CARD).read_text())


def test_a_report_as_json_has_the_field_names_of_the_card(long_names: tuple[str, str, Path]) -> None:
    name, parent, home = long_names
    reported = json.loads(show(quantize_app, "report", name, "--json", home=home).stdout)
    card = json.loads((home / "bases" / name / CARD).read_text())
    assert (reported["name"], reported["parent"]) == (name, parent)
    assert reported.items() <= card.items()
    assert reported["report"]["perplexity_before"] == 10.0


def test_an_error_is_one_line_on_stderr_with_json_too(home: Path) -> None:
    result = show(quantize_app, "report", "tiny", "--json", home=home)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "was not quantized" in result.stderr


def test_a_base_that_was_not_quantized_has_no_report(home: Path) -> None:
    result = runner.invoke(quantize_app, ["report", "tiny", "--home", str(home)])
    assert result.exit_code == 1
    assert "was not quantized" in result.stderr


def test_help_does_not_load_torch() -> None:
    script = "import sys, quantize.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
