"""Defines the lists, times and limits that the bodies and answers of admin and organization routes share."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from finetune.card import NAME_PATTERN
from serve.errors import InvalidRequest
from serve.rate_limits.limits import HIGHEST, MODEL_LENGTH_MAX, MODELS_MAX, Limits
from serve.storage.pagination import Page

FIELDS_MAX = 64


class Identified(BaseModel):
    """An item of a list. Its id is also the cursor to the next page."""

    id: str


Item = TypeVar("Item")
Wire = TypeVar("Wire", bound=Identified)

After = Annotated[
    str | None, Query(max_length=160, description="The id of the last item of the page before.")
]
Limit = Annotated[int, Query(ge=1, le=100, description="How many items at most.")]
PlainName = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=63)]
Title = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", min_length=1, max_length=100)]
Scope = Literal["inference", "files", "fine-tuning", "billing-read", "admin"]
Timestamp = Annotated[int, Field(ge=0, le=253_402_300_799, description="Unix time, in seconds.")]


class Body(BaseModel):
    """A client's body. An unknown field is a mistake, so it is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        """Each unknown field would be an error of its own."""
        if isinstance(data, dict) and len(data) > FIELDS_MAX:
            raise ValueError(f"at most {FIELDS_MAX} fields are allowed")
        return data


class Listing(BaseModel, Generic[Wire]):
    object: Literal["list"] = "list"
    data: list[Wire]
    has_more: bool
    first_id: str | None
    last_id: str | None


def _printable(models: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if any(not model.isprintable() for model in models or ()):
        raise ValueError("model names are printable")
    return models


class LimitsBody(Body):
    """Limits to change: only the named ones. Null lifts a limit."""

    requests_per_min: int | None = Field(None, ge=1, le=HIGHEST["requests_per_min"])
    tokens_per_min: int | None = Field(None, ge=1, le=HIGHEST["tokens_per_min"])
    concurrent_requests: int | None = Field(None, ge=1, le=HIGHEST["concurrent_requests"])
    context_tokens: int | None = Field(None, ge=1, le=HIGHEST["context_tokens"])
    models: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1, max_length=MODEL_LENGTH_MAX)], ...] | None,
        AfterValidator(_printable),
    ] = Field(
        None,
        min_length=1,
        max_length=MODELS_MAX,
        strict=False,  # JSON has no tuples
        description="Names; one that ends in * is a prefix.",
    )

    def named(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}


class LimitsWire(BaseModel):
    """Null: no limit of its own."""

    requests_per_min: int | None
    tokens_per_min: int | None
    concurrent_requests: int | None
    context_tokens: int | None
    models: tuple[str, ...] | None

    @classmethod
    def of(cls, limits: Limits) -> "LimitsWire":
        return cls(**asdict(limits))


def listing(page: Page[Item], wire: Callable[[Item], Wire]) -> Listing[Wire]:
    data = [wire(item) for item in page.items]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return Listing(data=data, has_more=page.has_more, first_id=ends[0], last_id=ends[1])


def slice_page(
    items: Sequence[Item], id_of: Callable[[Item], str], after: str | None, limit: int
) -> Page[Item]:
    """A page of a list that is in memory. Raises InvalidRequest if `after` is not the id of an item."""
    start = 0
    if after is not None:
        ids = [id_of(item) for item in items]
        if after not in ids:
            raise InvalidRequest("'after' is not the id of an item of this list.", "after", "invalid_value")
        start = ids.index(after) + 1
    return Page(items[start : start + limit], start + limit < len(items))


def now() -> datetime:
    return datetime.now(UTC)


def seconds(at: datetime) -> int:
    return int(at.timestamp())


def maybe_seconds(at: datetime | None) -> int | None:
    return None if at is None else seconds(at)


def moment(timestamp: int | None) -> datetime | None:
    return None if timestamp is None else datetime.fromtimestamp(timestamp, UTC)
