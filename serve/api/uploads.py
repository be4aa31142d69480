"""/v1/uploads: files that are sent in parts — platform.openai.com/docs/api-reference/uploads."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from serve.api.dependencies import Ctx, FilesPrincipal
from serve.api.files import EXPIRES_AFTER_S, FileObject, StoredFiles, file_object, uploading
from serve.api.forms import FileForm
from serve.api.schemas import errors
from serve.client_data.files import FILENAME_CHARS_MAX
from serve.client_data.uploads import PARTS_MAX, Upload, Uploads

router = APIRouter()

FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


class ExpiresAfter(BaseModel):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=EXPIRES_AFTER_S.start, lt=EXPIRES_AFTER_S.stop)


PartId = Annotated[str, Field(max_length=64)]


class UploadCreate(BaseModel):
    filename: str = Field(min_length=1, max_length=FILENAME_CHARS_MAX)
    purpose: Literal["batch", "fine-tune"]
    bytes: int = Field(ge=1)
    mime_type: str = Field(min_length=1, max_length=255)
    expires_after: ExpiresAfter | None = None


class UploadComplete(BaseModel):
    part_ids: Annotated[list[PartId], Field(min_length=1, max_length=PARTS_MAX, fail_fast=True)]
    md5: str | None = Field(None, pattern="^[0-9a-fA-F]{32}$")


class UploadObject(BaseModel):
    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None = None


class UploadPart(BaseModel):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


async def stored_uploads(ctx: Ctx, files: StoredFiles) -> Uploads:
    return Uploads(ctx.store, files)


StoredUploads = Annotated[Uploads, Depends(stored_uploads)]


@router.post("/v1/uploads", response_model=UploadObject, responses=errors(400, 401, 403, 503))
async def create(
    body: UploadCreate, principal: FilesPrincipal, ctx: Ctx, uploads: StoredUploads
) -> UploadObject:
    """The parts must come within an hour. `mime_type` is taken and not kept."""
    upload = await asyncio.to_thread(
        uploads.create,
        principal.tenant,
        purpose=body.purpose,
        filename=body.filename,
        size=body.bytes,
        file_expires_after_s=body.expires_after.seconds if body.expires_after else None,
        at=ctx.gateway.context.now(),
    )
    return _wire(upload)


@router.post(
    "/v1/uploads/{upload_id}/parts",
    response_model=UploadPart,
    responses=errors(400, 401, 403, 404, 413, 503),
    openapi_extra=FORM,
)
async def add_part(
    request: Request, upload_id: str, principal: FilesPrincipal, ctx: Ctx, uploads: StoredUploads
) -> UploadPart:
    """Parts may come in any order and at the same time; `complete` puts them in order."""
    tenant, at = principal.tenant, ctx.gateway.context.now()
    with uploading(request, tenant):
        draft = await asyncio.to_thread(uploads.draft_part, tenant, upload_id, at=at)
        try:
            form = FileForm(request.headers.get("content-type", ""), draft, "data")
            await form.read(request.stream())
        except BaseException:
            draft.discard()
            raise
        part = await asyncio.to_thread(uploads.add_part, tenant, upload_id, draft, at=at)
    return UploadPart(id=part.id, created_at=int(part.created_at.timestamp()), upload_id=part.upload_id)


@router.post(
    "/v1/uploads/{upload_id}/complete",
    response_model=UploadObject,
    responses=errors(400, 401, 403, 404, 503),
)
async def complete(
    upload_id: str, body: UploadComplete, principal: FilesPrincipal, ctx: Ctx, uploads: StoredUploads
) -> UploadObject:
    """Makes a file of the parts, in the order of `part_ids`. Their bytes must be as many as announced."""
    upload = await asyncio.to_thread(
        uploads.complete,
        principal.tenant,
        upload_id,
        body.part_ids,
        md5=body.md5,
        at=ctx.gateway.context.now(),
    )
    return _wire(upload)


@router.post(
    "/v1/uploads/{upload_id}/cancel",
    response_model=UploadObject,
    responses=errors(400, 401, 403, 404, 503),
)
async def cancel(upload_id: str, principal: FilesPrincipal, ctx: Ctx, uploads: StoredUploads) -> UploadObject:
    """Deletes the parts. No more can be added."""
    at = ctx.gateway.context.now()
    return _wire(await asyncio.to_thread(uploads.cancel, principal.tenant, upload_id, at=at))


def _wire(upload: Upload) -> UploadObject:
    return UploadObject(
        id=upload.id,
        bytes=upload.bytes,
        created_at=int(upload.created_at.timestamp()),
        expires_at=int(upload.expires_at.timestamp()),
        filename=upload.filename,
        purpose=upload.purpose,
        status=upload.status,
        file=file_object(upload.file) if upload.file else None,
    )
