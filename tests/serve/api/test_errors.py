"""Every error has a status and a body in OpenAI's format, and survives a process boundary."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.exceptions import RequestValidationError

from serve import errors
from serve.api.errors import invalid_request, render
from serve.formats.errors import STATUS, body_of, status_of, validation_text
from tests.support.scripted_app import HELLO, ScriptedApp

EXAMPLES = [
    errors.InvalidRequest("no", "n", "invalid_value"),
    errors.BodyTimeout(30.0),
    errors.BodyTooLarge(10),
    errors.HeadersTooLarge(10),
    errors.UnsupportedEncoding("br"),
    errors.ContextLengthExceeded(2048, 2000, 100, "max_tokens"),
    errors.Unauthenticated(),
    errors.PermissionDenied("inference"),
    errors.TenantSuspended(),
    errors.NotFound(),
    errors.MethodNotAllowed(),
    errors.ModelNotFound("x"),
    errors.ResponseNotFound("resp_x"),
    errors.ItemNotFound("msg_x"),
    errors.IdempotencyConflict(),
    errors.InsufficientCredit("acme", 5, 3, "USD"),
    errors.BudgetExceeded("project", "month", 10, 5, 3, "USD"),
    errors.RequestQuarantined(),
    errors.NotBillable("acme"),
    errors.RateLimited("tokens", 1000, 900, 200, 3),
    errors.Unavailable("later"),
    errors.EngineUnavailable(),
    errors.EngineLost(),
    errors.Overloaded(),
    errors.StoreUnavailable(),
    errors.ClientGone(),
    errors.EngineFailed(),
    errors.OperatorError("secret detail"),
    errors.AlreadyExists("The tenant 'acme' exists already."),
    errors.UnknownRecord("There is no tenant 'acme'."),
    errors.RegistryError("acme/support@1 is retired."),
    errors.Conflict("The project 'proj_1' is archived."),
    errors.ReconciliationFailed("secret detail"),
]


def subclasses(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from subclasses(child)


def test_every_error_has_an_example_here() -> None:
    ours = {cls for cls in subclasses(errors.BespokeError) if cls.__module__ == "serve.errors"}
    assert {type(example) for example in EXAMPLES} == ours


def test_every_branch_of_the_tree_is_mapped() -> None:
    for cls in errors.BespokeError.__subclasses__():
        assert cls in STATUS


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_survives_a_process_boundary(error: errors.BespokeError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.__dict__ == error.__dict__
    assert body_of(copy) == body_of(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_is_openai_shaped(error: errors.BespokeError) -> None:
    body = body_of(error)["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"]
    assert "secret" not in body["message"]
    status, _, _ = status_of(error)
    assert 400 <= status <= 503


def test_rays_errors_tell_a_dead_replica_from_a_deployment_without_any() -> None:
    from ray.exceptions import ActorDiedError, NodeDiedError
    from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

    from serve.deployment.ray_app import classify

    for lost in (ActorDiedError(), NodeDiedError("gone"), ReplicaUnavailableError("gone")):
        assert type(classify(lost)) is errors.EngineLost
    assert type(classify(DeploymentUnavailableError("engine"))) is errors.EngineUnavailable
    assert classify(ValueError()) is None


def test_unavailable_says_when_to_come_back() -> None:
    assert render(errors.StoreUnavailable()).headers["retry-after"] == "5"


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_a_refusal_that_clients_retry_says_when_or_that_no_retry_helps(error: errors.BespokeError) -> None:
    headers = render(error).headers
    if render(error).status_code in (409, 429):
        assert ("retry-after" in headers) != ("x-should-retry" in headers)
        assert headers.get("x-should-retry", "false") == "false"
    else:
        assert "x-should-retry" not in headers


def test_an_empty_account_and_a_request_above_its_limit_are_not_retried() -> None:
    for error in (
        errors.InsufficientCredit("acme", 5, 3, "USD"),
        errors.BudgetExceeded("project", "month", 10, 5, 3, "USD"),
        errors.NotBillable("acme"),
        errors.RateLimited("tokens", 1000, 0, 2000, None),
        errors.AlreadyExists("The tenant 'acme' exists already."),
    ):
        assert render(error).headers["x-should-retry"] == "false"
    assert render(errors.RateLimited("tokens", 1000, 900, 200, 3)).headers["retry-after"] == "3"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/v1/messages/batches/x"])
def test_errors_below_messages_are_anthropic_shaped(path: str) -> None:
    body = json.loads(render(errors.NotFound(), path).body)
    assert body == {"type": "error", "error": {"type": "not_found_error", "message": "Not found."}}


def test_a_path_that_only_begins_like_messages_is_openai_shaped() -> None:
    assert "type" not in json.loads(render(errors.NotFound(), "/v1/messages2").body)


def test_a_400_has_a_code_and_no_python_exception_in_its_message() -> None:
    assert body_of(errors.InvalidRequest("no"))["error"]["code"] == "invalid_value"
    for kind in ("Value error", "Assertion failed"):
        assert validation_text({"msg": f"{kind}, the prompt is empty"}) == "the prompt is empty"
    error = RequestValidationError([{"type": "value_error", "loc": ("body", "n"), "msg": "Value error, no"}])
    assert invalid_request(error).message == "n: no"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/responses/compact", 404),
        ("PUT", "/v1/responses/input_tokens", 405),
        ("POST", "/v1/files/upload", 404),
        ("GET", "/v1/messages/count_tokens", 405),
        ("POST", "/v1/messages/batches", 404),
        ("POST", "/v1/images/generations", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/messages", 405),
        ("PUT", "/v1/files", 405),
        ("PATCH", "/v1/files/file-12ab", 405),
        ("DELETE", "/v1/models/acme/support", 405),
    ],
)
def test_a_route_that_does_not_exist_is_404_and_a_wrong_method_405(
    tmp_path: Path, method: str, path: str, status: int
) -> None:
    answer = ScriptedApp(tmp_path, HELLO).ask(method, path, {} if method != "GET" else None)
    assert answer.status_code == status
    assert ("allow" in answer.headers) == (status == 405)
    body = answer.json()
    assert (body.get("type") == "error") == path.startswith("/v1/messages")
    if status == 404:
        assert path in body["error"]["message"]
