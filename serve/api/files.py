"""/v1/files — platform.openai.com/docs/api-reference/files."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel

from serve.api.dependencies import Ctx, FilesPrincipal
from serve.api.forms import FileForm
from serve.api.schemas import errors
from serve.batches.batches import Batches
from serve.client_data.files import PURPOSES, Draft, File, Files
from serve.errors import InvalidRequest, Overloaded

router = APIRouter()

UPLOADS_AT_ONCE = 4  # of one tenant, in one gateway
EXPIRES_AFTER_S = range(3600, 30 * 86400 + 1)

FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": EXPIRES_AFTER_S.start,
                            "maximum": EXPIRES_AFTER_S.stop - 1,
                        },
                    },
                }
            }
        },
    }
}


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: Sequence[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def install(app: FastAPI, files: Files, batches: Batches) -> None:
    """Give the routes of files and batches the stores that they work on."""
    app.state.files = files
    app.state.batches = batches
    app.state.uploading = Counter[str]()


async def stored_files(request: Request) -> Files:
    files: Files = request.app.state.files
    return files


async def stored_batches(request: Request) -> Batches:
    batches: Batches = request.app.state.batches
    return batches


StoredFiles = Annotated[Files, Depends(stored_files)]
StoredBatches = Annotated[Batches, Depends(stored_batches)]


@router.post(
    "/v1/files",
    response_model=FileObject,
    responses=errors(400, 401, 403, 413, 503),
    openapi_extra=FORM,
)
async def create(request: Request, principal: FilesPrincipal, ctx: Ctx, files: StoredFiles) -> FileObject:
    """The caller and its storage quota are checked before the body is read."""
    at = ctx.gateway.context.now()
    await asyncio.to_thread(files.check_quota, principal.tenant, at=at)
    with uploading(request, principal.tenant):
        draft = await asyncio.to_thread(files.draft, principal.tenant, bytes_max=files.bounds.file_bytes)
        try:
            form = FileForm(request.headers.get("content-type", ""), draft)
            await form.read(request.stream())
            purpose, expires_at = _purpose(form.fields), _expires_at(form.fields, at)
        except BaseException:
            draft.discard()
            raise
        return file_object(
            await asyncio.to_thread(_add, files, draft, principal.tenant, purpose, form, at, expires_at)
        )


@contextlib.contextmanager
def uploading(request: Request, tenant: str) -> Iterator[None]:
    """Bounds how many bodies with a file of one tenant are read at once. Raises Overloaded."""
    counts: Counter[str] = request.app.state.uploading
    if counts[tenant] >= UPLOADS_AT_ONCE:
        raise Overloaded("Too many uploads at once; please retry.")
    counts[tenant] += 1
    try:
        yield
    finally:
        counts[tenant] -= 1
        if not counts[tenant]:
            del counts[tenant]


@router.get("/v1/files", response_model=FileList, responses=errors(400, 401, 403, 503))
async def index(
    principal: FilesPrincipal,
    ctx: Ctx,
    files: StoredFiles,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: Annotated[str | None, Query(max_length=64)] = None,
    order: Literal["asc", "desc"] = "desc",
) -> FileList:
    page = await asyncio.to_thread(
        files.page,
        principal.tenant,
        at=ctx.gateway.context.now(),
        purpose=purpose,
        after=after,
        limit=limit,
        newest_first=order == "desc",
    )
    data = [file_object(file) for file in page.items]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return FileList(data=data, first_id=ends[0], last_id=ends[1], has_more=page.has_more)


@router.get("/v1/files/{file_id}", response_model=FileObject, responses=errors(401, 403, 404, 503))
async def show(file_id: str, principal: FilesPrincipal, ctx: Ctx, files: StoredFiles) -> FileObject:
    return file_object(
        await asyncio.to_thread(files.get, principal.tenant, file_id, at=ctx.gateway.context.now())
    )


@router.get(
    "/v1/files/{file_id}/content",
    response_class=FileResponse,
    responses=errors(401, 403, 404, 503) | {200: {"content": {"application/octet-stream": {}}}},
)
async def content(file_id: str, principal: FilesPrincipal, ctx: Ctx, files: StoredFiles) -> FileResponse:
    """The bytes as they were sent. The headers keep a browser from running them."""
    file = await asyncio.to_thread(files.get, principal.tenant, file_id, at=ctx.gateway.context.now())
    path = await asyncio.to_thread(files.path_of, principal.tenant, file.id)
    headers = {"x-content-type-options": "nosniff", "cache-control": "private, no-store"}
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename, headers=headers)


@router.delete("/v1/files/{file_id}", response_model=FileDeleted, responses=errors(401, 403, 404, 409, 503))
async def delete(
    file_id: str, principal: FilesPrincipal, ctx: Ctx, files: StoredFiles, batches: StoredBatches
) -> FileDeleted:
    """409 while a batch reads it."""
    at, readers = ctx.gateway.context.now(), batches.readers(file_id)
    await asyncio.to_thread(files.delete, principal.tenant, file_id, at=at, in_use=readers)
    return FileDeleted(id=file_id)


def _add(
    files: Files,
    draft: Draft,
    tenant: str,
    purpose: str,
    form: FileForm,
    at: datetime,
    expires_at: datetime | None,
) -> File:
    return files.add(
        draft, tenant, purpose=purpose, filename=form.filename or "", at=at, expires_at=expires_at
    )


def _purpose(fields: dict[str, str]) -> str:
    purpose = fields.get("purpose")
    if purpose not in PURPOSES:
        raise InvalidRequest(f"'purpose' must be one of: {', '.join(PURPOSES)}.", "purpose", "invalid_value")
    return purpose


def _expires_at(fields: dict[str, str], at: datetime) -> datetime | None:
    seconds, anchor = fields.get("expires_after[seconds]"), fields.get("expires_after[anchor]")
    if seconds is None and anchor is None:
        return None
    if anchor != "created_at" or not (seconds or "").isdecimal() or int(seconds or 0) not in EXPIRES_AFTER_S:
        most = EXPIRES_AFTER_S.stop - 1
        text = f"'expires_after' needs anchor created_at and {EXPIRES_AFTER_S.start} to {most} seconds."
        raise InvalidRequest(text, "expires_after", "invalid_value")
    return at + timedelta(seconds=int(seconds or 0))


def file_object(file: File) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at.timestamp()),
        expires_at=int(file.expires_at.timestamp()) if file.expires_at else None,
        filename=file.filename,
        purpose=file.purpose,
    )
