"""Parts become one file, once, in the order of the call; what is not completed leaves nothing."""

import asyncio
import hashlib
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import openai
import pytest

from serve.client_data.files import ORPHAN_AGE_S, FileBounds, Files
from serve.client_data.uploads import LIFETIME, PENDING_MAX, Upload, Uploads
from serve.errors import BespokeError, BodyTooLarge, InvalidRequest, NotFound
from tests.serve.api.test_files import Served
from tests.support.batching import jsonl, line
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON

LATER = NOON + LIFETIME


@pytest.fixture
def files(shop: BillingFixture, tmp_path: Path) -> Files:
    return Files(shop.store, tmp_path / "files", FileBounds(1000, 30, 3000))


@pytest.fixture
def uploads(shop: BillingFixture, files: Files) -> Uploads:
    return Uploads(shop.store, files)


def create(uploads: Uploads, size: int, **fields: int) -> Upload:
    return uploads.create("acme", purpose="batch", filename="../a.jsonl", size=size, at=NOON, **fields)  # type: ignore[arg-type]


def add(uploads: Uploads, upload: Upload, content: bytes) -> str:
    draft = uploads.draft_part("acme", upload.id, at=NOON)
    try:
        draft.write(content)
    except BaseException:
        draft.discard()
        raise
    return uploads.add_part("acme", upload.id, draft, at=NOON).id


def code_of(call: Callable[[], object]) -> str | None:
    with pytest.raises(InvalidRequest) as refused:
        call()
    return refused.value.code


def names(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "files").glob("*/*")}


def test_parts_are_put_together_in_the_order_of_the_call(
    uploads: Uploads, files: Files, tmp_path: Path
) -> None:
    upload = create(uploads, 6, file_expires_after_s=3600)
    last, first, unused = (add(uploads, upload, content) for content in (b"def", b"abc", b"abc"))
    md5 = hashlib.md5(b"abcdef").hexdigest().upper()
    completed = uploads.complete("acme", upload.id, [first, last], md5=md5, at=NOON)
    file = completed.file
    assert file is not None
    assert (completed.status, file.filename, file.bytes) == ("completed", "a.jsonl", 6)
    assert file.expires_at == NOON + timedelta(hours=1)
    assert files.path_of("acme", file.id).read_bytes() == b"abcdef"
    assert names(tmp_path) == {file.id}, "the parts are gone, the unused one too"
    assert uploads.complete("acme", upload.id, [unused], md5=None, at=NOON) == completed, "a retry"
    assert code_of(lambda: add(uploads, upload, b"x")) == "upload_not_pending"
    assert code_of(lambda: uploads.cancel("acme", upload.id, at=NOON)) == "upload_not_pending"
    assert uploads.sweep(at=LATER) == 1
    assert files.get("acme", file.id, at=NOON) == file


def test_what_does_not_fit_together_changes_nothing(uploads: Uploads, tmp_path: Path) -> None:
    upload, other = create(uploads, 6), create(uploads, 3)
    one, two, foreign = (
        add(uploads, upload, b"abc"),
        add(uploads, upload, b"def"),
        add(uploads, other, b"abc"),
    )
    before = names(tmp_path)
    wrong: list[tuple[list[str], str | None, str]] = [
        ([one], None, "invalid_value"),
        ([one, one], None, "invalid_value"),
        ([one, foreign], None, "invalid_value"),
        ([one, "part_\x00"], None, "invalid_value"),
        ([one, two], "0" * 32, "checksum_mismatch"),
    ]
    for part_ids, md5, code in wrong:
        complete = partial(uploads.complete, "acme", upload.id, part_ids, md5=md5, at=NOON)
        assert code_of(complete) == code
    assert names(tmp_path) == before
    assert uploads.complete("acme", upload.id, [one, two], md5=None, at=NOON).file


def test_uploads_are_bounded_by_what_was_announced_and_by_the_tenants_storage(
    uploads: Uploads, files: Files, tmp_path: Path
) -> None:
    assert code_of(lambda: create(uploads, 1001)) == "file_too_large"
    upload = create(uploads, 1000)
    with pytest.raises(BodyTooLarge):
        add(uploads, upload, b"x" * 1001)
    for _ in range(2):  # the second is a part whose answer was lost
        add(uploads, upload, b"x" * 1000)
    assert code_of(lambda: add(uploads, upload, b"x")) == "upload_limit_exceeded"
    other = create(uploads, 1000)
    add(uploads, other, b"x" * 1000)
    assert code_of(lambda: add(uploads, other, b"x")) == "storage_limit_exceeded"
    assert code_of(lambda: files.check_quota("acme", at=NOON)) == "storage_limit_exceeded"
    uploads.cancel("acme", upload.id, at=NOON)
    for _ in range(PENDING_MAX - 1):
        create(uploads, 1)
    assert code_of(lambda: create(uploads, 1)) == "upload_limit_exceeded"
    assert len(names(tmp_path)) == 1


def test_a_cancelled_upload_leaves_no_bytes(uploads: Uploads, tmp_path: Path) -> None:
    upload = create(uploads, 3)
    part = add(uploads, upload, b"abc")
    for _ in range(2):
        assert uploads.cancel("acme", upload.id, at=NOON).status == "cancelled"
    assert names(tmp_path) == set()
    complete = partial(uploads.complete, "acme", upload.id, [part], md5=None, at=NOON)
    assert code_of(complete) == "upload_not_pending"


def test_an_upload_that_is_too_old_is_refused_and_forgotten(
    uploads: Uploads, files: Files, tmp_path: Path
) -> None:
    upload = create(uploads, 3)
    part = add(uploads, upload, b"abc")
    with pytest.raises(InvalidRequest, match="expired"):
        uploads.complete("acme", upload.id, [part], md5=None, at=LATER)
    old_s = time.time() - ORPHAN_AGE_S - 1
    os.utime(files.path_of("acme", part), (old_s, old_s))
    assert files.sweep(at=NOON) == 0, "its row keeps it"
    assert uploads.sweep(at=LATER - timedelta(seconds=1)) == 0
    assert uploads.sweep(at=LATER) == 1
    assert names(tmp_path) == set()
    with pytest.raises(NotFound):
        uploads.cancel("acme", upload.id, at=NOON)


def test_anothers_upload_looks_like_none(uploads: Uploads) -> None:
    upload = create(uploads, 3)
    part = add(uploads, upload, b"abc")
    messages = set()
    for tenant, name in (("rival", upload.id), ("acme", "upload_x"), ("acme", "upload_\x00")):
        calls: list[Callable[[], object]] = [
            partial(uploads.draft_part, tenant, name, at=NOON),
            partial(uploads.complete, tenant, name, [part], md5=None, at=NOON),
            partial(uploads.cancel, tenant, name, at=NOON),
        ]
        for call in calls:
            with pytest.raises(BespokeError) as refused:
                call()
            assert type(refused.value) is NotFound
            messages.add(refused.value.message.replace(name, "…"))
    assert len(messages) == 1


def test_openais_client_sends_a_file_in_parts_and_runs_a_batch_of_it(tmp_path: Path) -> None:
    served = Served(tmp_path)
    content = jsonl(line("a"))

    async def test(client: Callable[[str], openai.AsyncOpenAI]) -> None:
        acme = client("acme")
        made = await acme.uploads.upload_file_chunked(
            file=content,
            filename="in.jsonl",
            bytes=len(content),
            mime_type="application/jsonl",
            purpose="batch",
            part_size=50,
            md5=hashlib.md5(content).hexdigest(),
        )
        assert made.file is not None
        assert (await acme.files.content(made.file.id)).content == content
        batch = await acme.batches.create(
            input_file_id=made.file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        while batch.status not in ("completed", "failed"):
            await asyncio.sleep(0.02)
            batch = await acme.batches.retrieve(batch.id)
        assert batch.status == "completed"
        pending = await acme.uploads.create(bytes=5, filename="b", mime_type="text/plain", purpose="batch")
        assert (pending.status, pending.file) == ("pending", None)
        assert (await acme.uploads.cancel(pending.id)).status == "cancelled"
        with pytest.raises(openai.BadRequestError):
            await acme.uploads.parts.create(pending.id, data=b"x")

    served.live(test)
    large = {"data": ("blob", b"x" * 60_000)}
    one = {"bytes": 60_000, "filename": "x", "mime_type": "y", "purpose": "batch"}
    upload_id = served.ask("POST", "/v1/uploads", json=one).json()["id"]
    path = f"/v1/uploads/{upload_id}/parts"
    assert served.ask("POST", path, files=large).status_code == 200, "more than another body may hold"
    assert served.ask("POST", path, files={"file": ("a", b"x")}).json()["error"]["param"] == "data"
    assert served.ask("POST", path, files=large, key=served.plain).status_code == 403
    bad = {"purpose": "assistants"}
    assert served.ask("POST", "/v1/uploads", json=one | bad).json()["error"]["param"] == "purpose"
