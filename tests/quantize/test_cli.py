import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from quantize.card import read_card
from quantize.cli import base_app, quantize_app
from quantize.spec import BaseSpec, QuantizeSpec

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


def spec_file(folder: Path, nf4_spec: QuantizeSpec, limit: float) -> str:
    """The quick settings, with another limit."""
    settings = nf4_spec.model_dump() | {"gate": {"perplexity_ratio_max": limit}}
    (folder / "spec.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "spec.yaml")


def test_import_then_show(tiny_spec: BaseSpec, tmp_path: Path) -> None:
    imported = runner.invoke(base_app, ["import", TINY], env={"BESPOKE_HOME": str(tmp_path)})
    assert imported.exit_code == 0, imported.output
    shown = runner.invoke(base_app, ["show", "tiny", "--home", str(tmp_path)])
    assert shown.exit_code == 0
    assert "tiny: intact" in shown.output
    assert read_card(tmp_path / "bases" / "tiny").weights_sha256[:32] in shown.output


def test_run_then_report(home: Path, nf4_spec: QuantizeSpec, tmp_path: Path) -> None:
    text = tmp_path / "prose.txt"
    text.write_text("Real prose is better than this line, but it is quick. " * 400)
    quick = spec_file(tmp_path, nf4_spec, limit=1.35)
    ran = runner.invoke(
        quantize_app, ["run", quick, "--base", "tiny", "--text", str(text), "--home", str(home)]
    )
    assert ran.exit_code == 0, ran.output
    assert "tiny-nf4 is in" in ran.output
    reported = runner.invoke(quantize_app, ["report", "tiny-nf4", "--home", str(home)])
    assert "prose.txt: 248 tokens" in reported.output
    assert "passed" in reported.output


def test_a_failed_gate_prints_its_measurements_and_fails(
    home: Path, nf4_spec: QuantizeSpec, tmp_path: Path
) -> None:
    strict = spec_file(tmp_path, nf4_spec, limit=0.5)
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


def test_a_base_that_was_not_quantized_has_no_report(home: Path) -> None:
    result = runner.invoke(quantize_app, ["report", "tiny", "--home", str(home)])
    assert result.exit_code == 1
    assert "was not quantized" in result.stderr


def test_help_does_not_load_torch() -> None:
    script = "import sys, quantize.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
