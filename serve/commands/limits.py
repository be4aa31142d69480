"""The options and the output of `bespoke tenant limits` and `bespoke key limits`."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

from serve.commands.tables import record
from serve.rate_limits.limits import Limits

RequestsOption = Annotated[int | None, typer.Option(min=1, help="Requests started in a minute.")]
TokensOption = Annotated[int | None, typer.Option(min=1, help="Tokens, read and written, in a minute.")]
ConcurrentOption = Annotated[int | None, typer.Option(min=1, help="Requests at the same time.")]
ContextOption = Annotated[int | None, typer.Option(min=1, help="Tokens of one request, read and written.")]
ModelsOption = Annotated[
    list[str] | None,
    typer.Option(help="An allowed model; may be repeated. A * ends a prefix."),
]
UnlimitedOption = Annotated[
    list[str] | None, typer.Option(help="A limit to lift: requests-per-min, tokens-per-min, …, models.")
]


def limits_to_change(
    requests_per_min: int | None,
    tokens_per_min: int | None,
    concurrent_requests: int | None,
    context_tokens: int | None,
    models: list[str] | None,
    unlimited: list[str] | None,
) -> dict[str, Any]:
    """The limits that were named. Raises typer.BadParameter for an unknown one to lift."""
    options = Limits(
        requests_per_min,
        tokens_per_min,
        concurrent_requests,
        context_tokens,
        tuple(models) if models else None,
    )
    named = {field: value for field, value in asdict(options).items() if value is not None}
    for name in unlimited or []:
        field = name.replace("-", "_")
        if field not in asdict(options):
            raise typer.BadParameter(f"there is no limit '{name}'")
        named[field] = None
    return named


def limits_record(kind: str, subject: str, limits: Limits) -> Text:
    """The limits of a tenant or a key, by name; `kind` says which of them the subject is."""
    fields = [(kind, subject)]
    for field, value in asdict(limits).items():
        text = ", ".join(value) if isinstance(value, tuple) else f"{value:,}" if value else "none"
        fields.append((field.replace("_", " "), text))
    return record(fields)
