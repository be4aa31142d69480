"""/v1/batches — platform.openai.com/docs/api-reference/batch."""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from serve.api.dependencies import Ctx, InferencePrincipal
from serve.api.files import StoredBatches
from serve.api.schemas import errors
from serve.batches.batches import Batch, BatchStatus

router = APIRouter()

Key = Annotated[str, Field(min_length=1, max_length=64)]
Value = Annotated[str, Field(max_length=512)]


class BatchCreate(BaseModel):
    input_file_id: str = Field(min_length=1, max_length=64)
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: Annotated[dict[Key, Value], Field(max_length=16, fail_fast=True)] | None = None


class BatchError(BaseModel):
    code: str
    message: str
    line: int | None
    param: str | None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchObject(BaseModel):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: Sequence[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.post("/v1/batches", response_model=BatchObject, responses=errors(400, 401, 403, 404, 409, 503))
async def create(
    body: BatchCreate, principal: InferencePrincipal, ctx: Ctx, batches: StoredBatches
) -> BatchObject:
    """The file is validated and run in the background."""
    batch = await asyncio.to_thread(
        batches.create,
        principal.tenant,
        principal.key_id,
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        metadata=body.metadata,
        at=ctx.gateway.context.now(),
    )
    return _wire(batch)


@router.get("/v1/batches", response_model=BatchList, responses=errors(400, 401, 403, 503))
async def index(
    principal: InferencePrincipal,
    batches: StoredBatches,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> BatchList:
    page = await asyncio.to_thread(batches.page, principal.tenant, after=after, limit=limit)
    data = [_wire(batch) for batch in page.items]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return BatchList(data=data, first_id=ends[0], last_id=ends[1], has_more=page.has_more)


@router.get("/v1/batches/{batch_id}", response_model=BatchObject, responses=errors(401, 403, 404, 503))
async def show(batch_id: str, principal: InferencePrincipal, batches: StoredBatches) -> BatchObject:
    return _wire(await asyncio.to_thread(batches.get, principal.tenant, batch_id))


@router.post(
    "/v1/batches/{batch_id}/cancel",
    response_model=BatchObject,
    responses=errors(401, 403, 404, 409, 503),
)
async def cancel(
    batch_id: str, principal: InferencePrincipal, ctx: Ctx, batches: StoredBatches
) -> BatchObject:
    """Lines that run already are finished, billed and part of the output."""
    at = ctx.gateway.context.now()
    return _wire(await asyncio.to_thread(batches.cancel, principal.tenant, batch_id, at=at))


def _wire(batch: Batch) -> BatchObject:
    line_errors = [
        BatchError(code=error.code, message=error.message, line=error.line, param=error.param)
        for error in batch.errors
    ]
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=BatchErrors(data=line_errors) if line_errors else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=int(batch.created_at.timestamp()),
        expires_at=int(batch.expires_at.timestamp()),
        request_counts=RequestCounts(total=batch.lines, completed=batch.completed, failed=batch.failed),
        metadata=batch.metadata,
        **{f"{name}_at": _seconds(at) for name, at in batch.times.items()},
    )


def _seconds(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())
