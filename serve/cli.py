"""`bespoke …`: the command, whose sub-apps are imported when they are used, so `--help` is instant."""

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

# name → ("module:typer app", one line for --help)
SUBCOMMANDS = {
    "serve": ("serve.commands.serve:app", "Run the gateway and the engines."),
    "demo": ("serve.commands.demo:app", "Two customers, from their data to their invoices."),
    "base": ("quantize.cli:base_app", "Import base models."),
    "data": ("finetune.cli:data_app", "Check and prepare customers' data."),
    "finetune": ("finetune.cli:finetune_app", "Train, evaluate and publish adapters."),
    "quantize": ("quantize.cli:quantize_app", "Quantize bases and report what it costs in quality."),
    "adapter": ("serve.commands.adapter:app", "Adapter versions: register, promote, list, pin, retire."),
    "tenant": ("serve.commands.tenant:app", "Tenants: create, suspend, limits, credit."),
    "key": ("serve.commands.key:app", "API keys of tenants: create, rotate, revoke, limits."),
    "project": ("serve.commands.project:app", "A tenant's projects: create, list, archive."),
    "platform": ("serve.commands.platform:app", "Platform keys, for the admin API."),
    "audit": ("serve.commands.audit:app", "Show the audit log, newest first."),
    "price": ("serve.commands.price:app", "Publish price plans and put tenants on them."),
    "budget": ("serve.commands.budget:app", "Budgets of tenants, projects and keys: set, list, retire."),
    "usage": ("serve.commands.usage:app", "Usage per tenant; its forecast; checks against the engines."),
    "invoice": ("serve.commands.invoice:app", "Invoices: create, review, finalize, credit, export."),
    "credit": ("serve.commands.credit:app", "Credit grants: prepaid, promotional or a credit line."),
}


class LazyGroup(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in SUBCOMMANDS:
            return None
        target, _ = SUBCOMMANDS[name]
        module, _, attribute = target.partition(":")
        return get_command(getattr(importlib.import_module(module), attribute))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.format_usage(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text(self.help or "")
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in SUBCOMMANDS.items()])


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Bespoke: a tailored language model for every customer, and a bill they can trust."""


def main() -> None:
    """Runs the command. An error that it reports is one line on stderr and exit status 1."""
    from finetune.errors import FinetuneError
    from quantize.errors import QuantizeError
    from serve.errors import BespokeError
    from serve.vllm_plugin import kernel_hub

    kernel_hub.install()  # fine-tuning and quantizing import bitsandbytes
    try:
        app()
    except (BespokeError, FinetuneError, QuantizeError) as error:
        typer.secho(f"bespoke: {error}", fg="red", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
