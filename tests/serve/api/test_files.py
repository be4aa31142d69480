"""/v1/files and /v1/batches work with OpenAI's own client."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.client_data.files import ORPHAN_AGE_S, FileBounds, Files, safe_name
from serve.deployment.app import build_app
from serve.errors import BodyTooLarge, InvalidRequest, NotFound
from serve.settings import LimitSettings, Settings
from tests.support.batching import CHAT, EchoEngine, Json, jsonl, line
from tests.support.billing_fixture import BillingFixture, onboard
from tests.support.constants import NOON, TINY

pytestmark = pytest.mark.usefixtures("app_on_both")

LIMITS = LimitSettings(
    file_bytes=100_000, files_per_tenant=4, files_bytes_per_tenant=250_000, body_bytes=20_000
)


class Served:
    """Runs the complete gateway over HTTP, with its worker, for the tenants acme and rival."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.engine = EchoEngine()
        self.app = build_app(Settings(home=home, bases=[TINY], limits=LIMITS), {TINY: self.engine})
        context = self.app.state.context
        self.keys = onboard(context.store, home, ("acme", "rival"))
        self.plain = context.tenants.create_key("acme", at=NOON, scopes=frozenset({"inference"}))[1]

    @asynccontextmanager
    async def http(self, key: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        headers = {"authorization": f"Bearer {key or self.keys['acme']}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://here", headers=headers) as client:
            yield client

    def ask(self, method: str, path: str, *, key: str | None = None, **request: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with self.http(key) as client:
                return await client.request(method, path, **request)

        return asyncio.run(send())

    def upload(self, content: bytes, *, filename: str = "in.jsonl", **fields: str) -> httpx.Response:
        data = {"purpose": "batch"} | fields
        return self.ask("POST", "/v1/files", files={"file": (filename, content)}, data=data)

    def live(self, test: Callable[[Callable[[str], openai.AsyncOpenAI]], Coroutine[Any, Any, None]]) -> None:
        """Run `test` while the worker runs; it gets a function that makes clients."""

        async def scenario() -> None:
            async with self.app.router.lifespan_context(self.app), self.http() as http:

                def client(tenant: str) -> openai.AsyncOpenAI:
                    key = self.keys[tenant]
                    return openai.AsyncOpenAI(
                        base_url="http://here/v1", api_key=key, http_client=http, max_retries=0
                    )

                await asyncio.wait_for(test(client), 30)

        asyncio.run(scenario())


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ('filename="plain.jsonl"', "plain.jsonl"),
        ('filename="東京.jsonl"', "東京.jsonl"),
        ("filename*=UTF-8''%E6%9D%B1%E4%BA%AC%20x.jsonl", "東京 x.jsonl"),
        ("filename*=utf-8'en'%e6%9d%b1.jsonl; filename=other", "東.jsonl"),
        ("filename*=iso-8859-1''K%E4se.jsonl", "Käse.jsonl"),
        ('filename="=?utf-8?B?5p2x5LqsLmpzb25s?="; filename*=utf-8%E6%9D%B1%E4%BA%AC.jsonl', "東京.jsonl"),
        ('filename="=?utf-8?B?5p2x5LqsLmpzb25s?="', "東京.jsonl"),
        ('filename="=?utf-8?Q?K=C3=A4se.jsonl?="', "Käse.jsonl"),
        ('filename="=?utf-8?B?5p2x?= =?utf-8?B?5Lqs?="', "東京"),
        ("filename=a.txt; filename*=utf-8''%FF", "a.txt"),
        ("filename=a.txt; filename*=no-such''%41", "a.txt"),
        ('filename="=?no-such?B?5p2x?="', "=?no-such?B?5p2x?="),
        ('filename="=?utf-8?B?%%%?="', "=?utf-8?B?%%%?="),
        ('filename="a=?b?c"', "a=?b?c"),
        ("filename=\"a; filename*=utf-8''b\"", "a; filename*=utf-8''b"),
        ("filename*=UTF-8''..%2F..%2Fetc%2Fpasswd%0d%0a", "passwd"),
    ],
)
def test_a_files_name_is_read_in_every_form_that_clients_send(
    served: Served, parameters: str, name: str
) -> None:
    head = f'--b\r\nContent-Disposition: form-data; name="file"; {parameters}\r\n\r\n{{}}\r\n'
    tail = '--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
    kind = {"content-type": "multipart/form-data; boundary=b"}
    created = served.ask("POST", "/v1/files", content=(head + tail).encode(), headers=kind)
    assert created.status_code == 200, created.text
    assert created.json()["filename"] == name


def test_a_file_comes_back_as_it_was_sent(served: Served) -> None:
    content = bytes(range(256)) * 300
    created = served.upload(content, filename="../../etc/pass wd\r\n\x00.jsonl").json()
    assert created["object"] == "file"
    assert (created["bytes"], created["purpose"], created["expires_at"]) == (len(content), "batch", None)
    assert "/" not in created["filename"]
    assert "\n" not in created["filename"]
    path = f"/v1/files/{created['id']}"
    assert served.ask("GET", path).json() == created
    got = served.ask("GET", f"{path}/content")
    assert got.content == content
    assert got.headers["content-type"] == "application/octet-stream"
    assert got.headers["content-disposition"].startswith("attachment")
    assert (served.home / "files" / "acme" / created["id"]).read_bytes() == content
    assert served.ask("DELETE", path).json() == {"id": created["id"], "object": "file", "deleted": True}
    assert served.ask("GET", path).status_code == 404
    assert not list((served.home / "files" / "acme").iterdir())


def test_files_are_listed_by_purpose_in_pages(served: Served) -> None:
    ids = [served.upload(b"x").json()["id"] for _ in range(3)]
    served.upload(b"x", purpose="fine-tune")
    page = served.ask("GET", "/v1/files?purpose=batch&limit=2&order=asc").json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (ids[:2], True)
    page = served.ask("GET", f"/v1/files?purpose=batch&order=asc&after={page['last_id']}").json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (ids[2:], False)
    newest = served.ask("GET", "/v1/files").json()["data"][0]
    assert newest["purpose"] == "fine-tune"
    assert served.ask("GET", "/v1/files?after=file-x").status_code == 400
    assert served.ask("GET", "/v1/files?order=up").status_code == 400


def test_a_file_has_a_bound_and_a_tenant_too(served: Served) -> None:
    assert served.upload(b"x" * 100_000).status_code == 200
    assert served.upload(b"x" * 100_001).status_code == 413
    assert served.upload(b"x" * 300_000).status_code == 413
    assert served.upload(b"x" * 100_000).status_code == 200
    refused = served.upload(b"x" * 100_000)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "storage_limit_exceeded")
    for _ in range(2):
        assert served.upload(b"x").status_code == 200
    assert served.upload(b"x").json()["error"]["code"] == "storage_limit_exceeded"
    assert len(list((served.home / "files" / "acme").iterdir())) == 4


def test_other_bodies_keep_their_own_bound(served: Served) -> None:
    assert served.ask("POST", CHAT, content=b" " * 20_001).status_code == 413
    assert served.ask("POST", "/v1/batches", content=b" " * 20_001).status_code == 413


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"json": {"file": "x"}}, "file"),
        ({"data": {"purpose": "batch"}, "files": {"other": b"x"}}, "file"),
        ({"data": {"purpose": "assistants"}, "files": {"file": b"x"}}, "purpose"),
        ({"files": {"file": b"x"}}, "purpose"),
        ({"data": {"purpose": "x" * 2000}, "files": {"file": b"x"}}, "purpose"),
        ({"data": {"purpose": "batch"}, "files": [("file", b"x"), ("file", b"y")]}, "file"),
        ({"data": {str(n): "x" for n in range(30)}, "files": {"file": b"x"}}, None),
        (
            {
                "data": {"purpose": "batch", "expires_after[anchor]": "created_at"},
                "files": {"file": b"x"},
            },
            "expires_after",
        ),
        (
            {
                "content": b"--b\r\nContent-Disposition: form-data; name=file\r\n\r\nx",
                "headers": {"content-type": "multipart/form-data; boundary=b"},
            },
            None,
        ),
        (
            {"content": b"garbage", "headers": {"content-type": "multipart/form-data; boundary=b"}},
            None,
        ),
    ],
)
def test_a_malformed_upload_is_refused_and_leaves_nothing(
    served: Served, request_: Json, param: str | None
) -> None:
    answer = served.ask("POST", "/v1/files", **request_)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert not list((served.home / "files").glob("*/*"))


def test_a_file_may_be_kept_for_a_time(served: Served) -> None:
    times = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    created = served.upload(b"x", **times).json()
    assert created["expires_at"] - created["created_at"] == 3600


def test_files_need_their_scope(served: Served) -> None:
    key = served.plain
    for method, path in (("GET", "/v1/files"), ("POST", "/v1/files"), ("DELETE", "/v1/files/file-1")):
        answer = served.ask(method, path, key=key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_permissions")
    assert served.ask("GET", "/v1/files", key="bsk-no").status_code == 401


def test_another_tenants_files_and_batches_look_like_none(served: Served) -> None:
    file_id = served.upload(jsonl(line("a"))).json()["id"]
    batch = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    batch_id = served.ask("POST", "/v1/batches", json=batch).json()["id"]
    for method, path, mine in (
        ("GET", "/v1/files/{}", file_id),
        ("GET", "/v1/files/{}/content", file_id),
        ("DELETE", "/v1/files/{}", file_id),
        ("GET", "/v1/batches/{}", batch_id),
        ("POST", "/v1/batches/{}/cancel", batch_id),
    ):
        unknown = mine[:-8] + "00000000"
        theirs = served.ask(method, path.format(mine), key=served.keys["rival"])
        nobodys = served.ask(method, path.format(unknown), key=served.keys["rival"])
        assert theirs.status_code == nobodys.status_code == 404
        assert theirs.text.replace(mine, "") == nobodys.text.replace(unknown, "")
    theirs = served.ask("POST", "/v1/batches", json=batch, key=served.keys["rival"])
    assert theirs.status_code == 404
    for path in ("/v1/files", "/v1/batches"):
        assert served.ask("GET", path, key=served.keys["rival"]).json()["data"] == []
        after = served.ask("GET", f"{path}?after={file_id}", key=served.keys["rival"])
        assert after.status_code == 400


@pytest.mark.parametrize("strange", ["%00", "file-%00", "..%2f..%2fledger.db", "%F0%9F%8E%89", "x" * 5000])
def test_strange_names_are_not_found(served: Served, strange: str) -> None:
    for path in ("/v1/files/", "/v1/batches/"):
        assert served.ask("GET", path + strange).status_code == 404
    assert served.ask("GET", f"/v1/files?after={strange}").status_code == 400


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/responses"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
        ({"input_file_id": ""}, "input_file_id"),
    ],
)
def test_a_batch_that_breaks_a_rule_is_refused(served: Served, change: Json, param: str) -> None:
    body = {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h"} | change
    answer = served.ask("POST", "/v1/batches", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_openais_client_runs_a_batch(served: Served) -> None:
    async def test(client: Callable[[str], openai.AsyncOpenAI]) -> None:
        acme = client("acme")
        content = jsonl(line("a"), line("b"), line("c", model="no"))
        file = await acme.files.create(file=("in.jsonl", content), purpose="batch")
        batch = await acme.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"run": "1"}
        )
        assert (batch.status, batch.metadata) == ("validating", {"run": "1"})
        while batch.status != "completed":
            await asyncio.sleep(0.05)
            batch = await acme.batches.retrieve(batch.id)
        counts = batch.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
        assert batch.output_file_id is not None
        assert batch.error_file_id is not None
        output = await acme.files.content(batch.output_file_id)
        lines = [json.loads(text) for text in output.text.splitlines()]
        assert [(one["custom_id"], one["error"]) for one in lines] == [("a", None), ("b", None)]
        assert lines[0]["response"]["body"]["choices"][0]["message"]["content"] == "a"
        assert '"custom_id":"c"' in (await acme.files.content(batch.error_file_id)).text
        assert [one.id for one in (await acme.batches.list()).data] == [batch.id]
        created = await acme.files.retrieve(batch.output_file_id)
        assert (created.purpose, created.filename) == ("batch_output", f"{batch.id}_output.jsonl")
        with pytest.raises(openai.ConflictError):
            await acme.batches.cancel(batch.id)

    served.live(test)


def test_openais_client_reads_what_is_wrong_with_a_file(served: Served) -> None:
    async def test(client: Callable[[str], openai.AsyncOpenAI]) -> None:
        acme = client("acme")
        file = await acme.files.create(file=("in.jsonl", jsonl(line("a", n=99))), purpose="batch")
        batch = await acme.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        while batch.status != "failed":
            await asyncio.sleep(0.05)
            batch = await acme.batches.retrieve(batch.id)
        assert batch.errors is not None
        assert batch.errors.data is not None
        (error,) = batch.errors.data
        assert (error.line, error.param) == (1, "body.n")

    served.live(test)


@pytest.fixture
def files(shop: BillingFixture, tmp_path: Path) -> Files:
    return Files(shop.store, tmp_path / "files", FileBounds(1000, 10, 10_000))


def test_a_file_that_has_expired_is_gone_and_swept(files: Files, tmp_path: Path) -> None:
    end = NOON + timedelta(hours=1)
    stored = files.add(files.draft("acme"), "acme", purpose="batch", filename="a", at=NOON)
    soon = files.add(files.draft("acme"), "acme", purpose="batch", filename="a", at=NOON, expires_at=end)
    half = files.draft("acme")
    assert files.get("acme", soon.id, at=NOON) == soon
    with pytest.raises(NotFound):
        files.get("acme", soon.id, at=end)
    assert files.sweep(at=end) == 0  # young: they may be on their way in
    old_s = time.time() - ORPHAN_AGE_S - 1
    for path in (tmp_path / "files" / "acme").iterdir():
        os.utime(path, (old_s, old_s))
    assert files.sweep(at=end) == 2
    assert [path.name for path in (tmp_path / "files" / "acme").iterdir()] == [stored.id]
    half.discard()


def test_a_draft_stops_at_its_bound_and_an_upload_at_the_tenants(files: Files, tmp_path: Path) -> None:
    draft = files.draft("acme", bytes_max=10)
    with pytest.raises(BodyTooLarge):
        draft.write(b"x" * 11)
    draft.discard()
    large = files.draft("acme")
    large.write(b"x" * 10_001)
    with pytest.raises(InvalidRequest, match="in all"):
        files.add(large, "acme", purpose="batch", filename="a", at=NOON)
    assert not list((tmp_path / "files" / "acme").iterdir())


@pytest.mark.parametrize(
    ("given", "safe"),
    [
        ("a.jsonl", "a.jsonl"),
        ("../../a", "a"),
        ("C:\\x\\a", "a"),
        ("..", "file"),
        ("", "file"),
        ("a\r\nb\x00\u202e", "ab"),
        ("x" * 300, "x" * 255),
        ("dir/", "file"),
    ],
)
def test_a_filename_is_only_ever_a_name(given: str, safe: str) -> None:
    assert safe_name(given) == safe
