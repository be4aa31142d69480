"""Tables in a pipe, in a terminal of 80 columns, and in one that is too narrow for their names."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from serve.billing.budgets.service import BudgetService
from serve.billing.invoicing.invoices import Invoices
from serve.billing.ledger.ledger import Ledger
from serve.cli import app
from serve.commands.common import console
from serve.commands.tables import Table, record
from serve.registry.registry import AdapterRegistry
from serve.storage.database import Store
from serve.tenants import Tenants, server_secret
from tests.support.constants import NOON
from tests.support.lora_samples import publish_base, publish_sample

TENANT = "northern-lights-insurance-and-reinsurance-company-of-reykjavik-".ljust(62, "x")[:62] + "1"
MODEL = f"{TENANT}/claims-handling-assistant@0123456789abcdef"


def printed(table: Table, *, width: int | None) -> list[str]:
    """The lines of a table in a terminal of that width; None: in a pipe."""
    file = io.StringIO()
    terminal = {"force_terminal": True, "width": width} if width else {}
    Console(file=file, soft_wrap=True, color_system=None, **terminal).print(table)  # type: ignore[arg-type]
    return file.getvalue().splitlines()


def sample(name: str) -> Table:
    table = Table("model", ">tokens", "reason", title=f"of {name}")
    table.add_row(name, "1,234", "a reason of several words that may be folded between any two of them")
    table.add_row("tiny", "5", "")
    return table


def test_a_pipe_gets_each_row_on_one_line() -> None:
    title, *lines = printed(sample(MODEL), width=None)
    assert title == f"of {MODEL}"
    assert [len(line.split()) for line in lines] == [3, 16, 2]
    assert lines[0].startswith("model  ")
    assert lines[1].startswith(f"{MODEL}   1,234  a reason")


def test_a_terminal_gets_cells_folded_between_words_and_names_whole() -> None:
    name = "lumen-bikes/support@0123456789abcdef"
    lines = printed(sample(name), width=80)
    assert lines == [
        f"of {name}",
        "model                                 tokens  reason",
        f"{name}   1,234  a reason of several words that may",
        "                                              be folded between any two of them",
        "tiny                                       5",
    ]


def test_a_terminal_has_no_column_without_a_value() -> None:
    table = Table("key", "retired", ">spent")
    table.add_row("有限公司", "", "1")
    assert printed(table, width=80) == ["key       spent", "有限公司      1"]
    assert printed(table, width=None) == ["key       retired  spent", "有限公司               1"]


def test_a_name_that_does_not_fit_makes_each_row_a_record() -> None:
    assert printed(sample(MODEL), width=80) == [
        f"of {MODEL}",
        f"model   {MODEL}",
        "tokens  1,234",
        "reason  a reason of several words that may be folded between any two of them",
        "",
        "model   tiny",
        "tokens  5",
    ]


def test_a_name_with_spaces_stays_on_one_line() -> None:
    table = Table("!plan", "model")
    table.add_row("enterprise v1", "base " * 20)
    assert printed(table, width=40)[1] == "enterprise v1  base base base base base"


def test_headers_without_rows_are_a_table_at_any_width() -> None:
    assert printed(Table("a-header-of-its-own", "another-header"), width=20)


def test_cells_are_plain_text() -> None:
    table = Table("reason")
    table.add_row("its logits are [the base's]")
    assert any("[the base's]" in line for line in printed(table, width=80))
    assert record([("reason", "[bold]"), ("empty", "")]).plain == "reason  [bold]"


def test_no_command_cuts_a_name_at_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESPOKE_HOME", str(tmp_path))
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_width", 80)
    store = Store(f"sqlite:///{tmp_path / 'ledger.db'}")
    store.migrate()
    tenants = Tenants(store, server_secret(tmp_path))
    tenants.create(TENANT, at=NOON)
    Ledger(store).open_account(TENANT, 123_456_789_000_000_001)
    project = tenants.projects.create(TENANT, "q" * 63, at=NOON).id
    key, _ = tenants.keys.create(TENANT, at=NOON, name="nightly claims import " * 3, project=project)
    platform_key, _ = tenants.platform_keys.create("n" * 100, at=NOON)
    budget = BudgetService(store).create(TENANT, "project", project, "month", 10**15, at=NOON).budget.id
    publish_base(tmp_path, "smollm2-135m")
    directory = publish_sample(tmp_path, TENANT, "claims-handling-assistant", base="smollm2-135m")
    registry = AdapterRegistry(store, ["smollm2-135m"])
    base_dir = tmp_path / "bases" / "smollm2-135m"
    model = registry.register(directory, at=NOON, base_dir=base_dir, max_rank=16).model
    invoice = Invoices(store).create(TENANT, "2026-11", at=NOON).number
    store.close()

    for arguments, names in {
        ("tenant", "list"): (TENANT, "123456789.000000001"),
        ("tenant", "limits", TENANT): (TENANT,),
        ("project", "list", TENANT): (project, "q" * 63),
        ("key", "list", TENANT): (key.id, project),
        ("key", "limits", key.id): (key.id,),
        ("platform", "key", "list"): (platform_key.id, "n" * 100),
        ("budget", "list", TENANT): (budget, project),
        ("budget", "show", TENANT, budget): (budget, project),
        ("adapter", "list"): (model, "smollm2-135m"),
        ("adapter", "show", model): (model,),
        ("adapter", "pin", model): (model,),
        ("invoice", "list"): (invoice, TENANT),
        ("invoice", "show", invoice): (invoice,),
        ("audit",): (TENANT, model, key.id, budget),
    }.items():
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, (arguments, result.output, result.exception)
        assert [name for name in names if name not in result.output] == [], result.output
        assert "…" not in result.output.replace(f"…{key.hint}", "").replace(f"…{platform_key.hint}", "")
