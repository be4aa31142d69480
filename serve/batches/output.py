"""Writes a batch's output: one file of answers and one of errors, in the order of the input."""

import hashlib
import json
import logging
from collections.abc import Iterator
from datetime import datetime

from serve.batches.batches import OK, Batch, BatchStatus
from serve.batches.input import numbered_lines, read_line
from serve.batches.lines import Lines, Result
from serve.batches.queue import BatchQueue
from serve.client_data.files import OUTPUT, Draft, File, Files
from serve.errors import StoreUnavailable
from serve.formats.response_format import Json

log = logging.getLogger(__name__)

NOT_RUN: dict[BatchStatus, Json] = {
    BatchStatus.EXPIRED: {
        "code": "batch_expired",
        "message": "This request could not be executed before the completion window expired.",
    },
    BatchStatus.CANCELLED: {
        "code": "batch_cancelled",
        "message": "This request was not executed before the batch was cancelled.",
    },
}


def write_output(
    batch: Batch, status: BatchStatus, *, lines: Lines, files: Files, queue: BatchQueue, at: datetime
) -> None:
    """End `batch` with `status`: completed (expired if lines have no result) or cancelled. Blocks.

    Leaves no file behind if this worker has lost the lease.
    """
    done = lines.finished_lines(batch.id)
    if status is BatchStatus.COMPLETED and len(done) < batch.lines:
        status = BatchStatus.EXPIRED
    output, errors = files.draft(batch.tenant), files.draft(batch.tenant)
    published = False
    try:
        for result in lines.results(batch.id):
            _write(output if result.status_code == OK else errors, _output_line(batch, result))
        if status in NOT_RUN:
            for entry in _not_run(batch, status, done, files):
                _write(errors, entry)
        files_written = _publish(output, batch, "output", at), _publish(errors, batch, "error", at)
        published = True  # from here on, the files stay unless the store clearly refuses them
        published = queue.end(batch.id, status, output=files_written[0], errors=files_written[1], at=at)
    finally:
        for draft in (output, errors):
            if not published or draft.bytes == 0:
                draft.discard()


def _write(draft: Draft, entry: Json) -> None:
    draft.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")


def _publish(draft: Draft, batch: Batch, name: str, at: datetime) -> File | None:
    if draft.bytes == 0:
        return None
    draft.publish()
    return File(draft.id, batch.tenant, OUTPUT, f"{batch.id}_{name}.jsonl", draft.bytes, draft.sha256, at)


def _output_line(batch: Batch, result: Result) -> Json:
    response = {"status_code": result.status_code, "request_id": result.request_id, "body": result.body}
    return {
        "id": _id(batch, result.line),
        "custom_id": result.custom_id,
        "response": response,
        "error": None,
    }


def _not_run(batch: Batch, status: BatchStatus, done: set[int], files: Files) -> Iterator[Json]:
    if batch.lines == 0:  # not validated: its lines may be anything
        return
    try:
        path = files.path_of(batch.tenant, batch.input_file_id)
    except StoreUnavailable:  # the batch must end nevertheless
        log.error("the input of %s is gone", batch.id)
        return
    for number, raw in numbered_lines(path):
        if number not in done:
            yield {
                "id": _id(batch, number),
                "custom_id": read_line(raw).custom_id,
                "response": None,
                "error": NOT_RUN[status],
            }


def _id(batch: Batch, line: int) -> str:
    """A line's id in the output. It is the same each time the files are written."""
    return "batch_req_" + hashlib.sha256(f"{batch.id}/{line}".encode()).hexdigest()[:32]
