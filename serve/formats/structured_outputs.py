"""Reads vLLM's `structured_outputs`, and the `guided_…` fields that came before it.

docs.vllm.ai/en/latest/features/structured_outputs.html. JSON is asked for as by `response_format`. A choice
and a regular expression pass the bounds of JSON Schemas, as `enum` and `pattern`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve.engine.protocol import JsonFormat, TextFormat
from serve.errors import InvalidRequest
from serve.formats.body_budget import FreeObject
from serve.formats.bounds import schema_of, schema_text
from serve.formats.schema_budget import Schema

TEXTS_MAX = 1_000
GUIDED = ("json", "regex", "choice")
# Each with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "grammar": (None,),
    "structural_tag": (None,),
    "whitespace_pattern": (None,),
    "disable_any_whitespace": (None, False, True),  # it always is
    "disable_additional_properties": (None, False),
}

Text = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=TEXTS_MAX, fail_fast=True)]


class StructuredOutputs(BaseModel):
    """Says what the answer must be: JSON of a schema, any JSON object, one of some texts, or a pattern."""

    model_config = ConfigDict(populate_by_name=True)

    # Not called `json`, which pydantic's models have already.
    document: FreeObject | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Choices | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        for name, harmless in _UNSUPPORTED.items():
            if isinstance(data, dict) and data.get(name) not in harmless:
                param = f"structured_outputs.{name}"
                raise InvalidRequest(f"'{param}' is not supported.", param, "unsupported_parameter")
        return data


@dataclass(frozen=True, slots=True)
class Constraint:
    """Holds the one form that an answer must have, and the bound that it passes."""

    param: str
    schema: Schema | None
    format: JsonFormat | TextFormat


def constraints_of(outputs: StructuredOutputs, prefix: str) -> Iterator[Constraint]:
    """Yields what `outputs` asks for. `prefix` begins the client's name of each."""
    if outputs.document is not None:
        param = f"{prefix}json"
        document = schema_of(outputs.document, param)
        yield Constraint(param, Schema(param, document), JsonFormat(schema_text(document), param))
    if outputs.json_object:
        yield Constraint(f"{prefix}json_object", None, JsonFormat())
    if outputs.regex is not None:
        param = f"{prefix}regex"
        text = TextFormat(regex=outputs.regex, param=param)
        yield Constraint(param, Schema(param, {"type": "string", "pattern": outputs.regex}), text)
    if outputs.choice is not None:
        param = f"{prefix}choice"
        yield Constraint(
            param,
            Schema(param, {"enum": outputs.choice}),
            TextFormat(choices=tuple(outputs.choice), param=param),
        )
