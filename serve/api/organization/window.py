"""Divides a query's time into buckets and pages, as OpenAI's usage API does.

Buckets begin with their UTC day, hour or minute. Only the first may be cut short, by a `start_time` within
it, and the last, by an `end_time` within it. A page holds `limit` buckets, including those without usage;
its cursor names the start of the next bucket.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from serve.billing.metering.queries import DAY, HOUR, MINUTE, floor
from serve.errors import InvalidRequest

Width = Literal["1m", "1h", "1d"]
WIDTHS = {"1m": MINUTE, "1h": HOUR, "1d": DAY}
NAMES_MAX = 100
GROUPS_MAX = 20_000
LATEST_S = 253_402_214_399  # the last second of 9999-12-30: a bucket's end is still a time

Result = TypeVar("Result", bound=BaseModel)

Seconds = Annotated[int, Field(ge=0, le=LATEST_S)]
Name = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=160)]
Names = Annotated[list[Name], Field(max_length=NAMES_MAX)]


def _boolean(value: Any) -> Any:
    """Accepts only the document's two words; pydantic accepts others too."""
    if isinstance(value, str) and value not in ("true", "false"):
        raise ValueError("true or false")
    return value


Boolean = Annotated[bool, BeforeValidator(_boolean)]


class Window(BaseModel):
    """Holds the parameters that all queries share. An unknown parameter is refused by name.

    A list may be sent as `models=a&models=b` or, as OpenAI's clients do, as `models[]=a`.
    """

    model_config = ConfigDict(extra="forbid")

    start_time: Seconds = Field(description="Unix time in seconds, inclusive.")
    end_time: Seconds | None = Field(None, description="Unix time in seconds, exclusive. Default: now.")
    page: Annotated[str, StringConstraints(pattern=r"^page_[0-9]{1,12}$")] | None = Field(
        None, description="`next_page` of the page before."
    )
    project_ids: Names = Field([])
    project_ids_: Names = Field([], alias="project_ids[]")
    api_key_ids: Names = Field([])
    api_key_ids_: Names = Field([], alias="api_key_ids[]")
    tenant_ids: Names = Field([], description="For platform keys.")
    tenant_ids_: Names = Field([], alias="tenant_ids[]", description="For platform keys.")

    def names(self, parameter: str) -> tuple[str, ...]:
        """The values of `parameter`, in either spelling."""
        return (*getattr(self, parameter), *getattr(self, f"{parameter}_"))


@dataclass(frozen=True, slots=True)
class Span:
    """Holds the buckets of one page, each [start, end), and the cursor of the next page, if any."""

    buckets: Sequence[tuple[datetime, datetime]]
    next_page: str | None

    @property
    def start(self) -> datetime:
        return self.buckets[0][0]

    @property
    def end(self) -> datetime:
        return self.buckets[-1][1]


def span(window: Window, width: timedelta, limit: int, *, now: datetime) -> Span:
    """The buckets of the window's page. Raises InvalidRequest if it is empty or its cursor is not its own."""
    start = datetime.fromtimestamp(window.start_time, UTC)
    if window.end_time is None:
        end = floor(now, width) + width
    else:
        end = datetime.fromtimestamp(window.end_time, UTC)
    if end <= start:
        param = "start_time" if window.end_time is None else "end_time"
        raise InvalidRequest(f"{param}: the end must come after the start.", param, "invalid_value")
    if window.page is not None:
        cursor = int(window.page.removeprefix("page_"))
        at = datetime.fromtimestamp(min(cursor, LATEST_S), UTC)
        if not start < at < end or floor(at, width) != at:
            raise InvalidRequest("page: not a page of this question.", "page", "invalid_value")
        start = at
    buckets: list[tuple[datetime, datetime]] = []
    while start < end and len(buckets) < limit:
        next_start = floor(start, width) + width
        buckets.append((start, min(next_start, end)))
        start = next_start
    return Span(buckets, f"page_{int(start.timestamp())}" if start < end else None)


class TimeBucket(BaseModel, Generic[Result]):
    object: Literal["bucket"] = "bucket"
    start_time: int
    end_time: int
    results: list[Result]


class Page(BaseModel, Generic[Result]):
    object: Literal["page"] = "page"
    data: list[TimeBucket[Result]]
    has_more: bool
    next_page: str | None


def in_buckets(
    span: Span, width: timedelta, results: Iterable[tuple[datetime, Result]]
) -> tuple[list[TimeBucket[Result]], bool, str | None]:
    """`Page`'s data, has_more and next_page: each of `results` in the bucket that it names."""
    by_bucket: dict[datetime, list[Result]] = defaultdict(list)
    for bucket, result in results:
        by_bucket[bucket].append(result)
    data: list[TimeBucket[Result]] = [
        TimeBucket(
            start_time=int(start.timestamp()),
            end_time=int(end.timestamp()),
            results=by_bucket[floor(start, width)],
        )
        for start, end in span.buckets
    ]
    return data, span.next_page is not None, span.next_page
