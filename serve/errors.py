"""Defines every error that `serve` raises on purpose.

    BespokeError
    ├── InvalidRequest               the client's request breaks a rule
    │   ├── BodyTimeout
    │   ├── BodyTooLarge
    │   ├── ContextLengthExceeded
    │   ├── HeadersTooLarge
    │   └── UnsupportedEncoding
    ├── Unauthenticated
    ├── PermissionDenied
    ├── TenantSuspended              its keys are good, but it may not use the service now
    ├── NotFound                     a route, or another HTTP-level miss
    │   ├── ItemNotFound             an item of a stored response
    │   ├── MethodNotAllowed
    │   ├── ModelNotFound
    │   └── ResponseNotFound
    ├── IdempotencyConflict          the first request with this Idempotency-Key still runs
    ├── InsufficientCredit
    │   └── BudgetExceeded           a hard budget of the tenant, project or key
    ├── RequestQuarantined           replicas died with this request: it is not run for some minutes
    ├── NotBillable                  the tenant has no price plan
    ├── RateLimited                  a limit of the tenant or the key is used up
    ├── Unavailable                  try again later; carries `retry_after_s`
    │   ├── EngineUnavailable
    │   │   └── EngineLost           the replica died; another one may do
    │   ├── Overloaded
    │   └── StoreUnavailable
    ├── ClientGone                   nobody is left to answer
    ├── EngineFailed                 the engine broke after it had accepted the request
    └── OperatorError                the operator's input or state is wrong (command line)
        ├── AlreadyExists
        ├── Conflict                 the record's state forbids it
        ├── ReconciliationFailed
        ├── RegistryError
        └── UnknownRecord

Errors carry data, not prose built elsewhere. They pickle (Ray ships them in control calls), and replicas
send them as a type and plain arguments (`serve.engine.transport.errors`): `args` are always exactly the
constructor's positional arguments. `serve.formats.errors` alone maps a type to an HTTP status.
"""


class BespokeError(Exception):
    """The root of the tree."""

    @property
    def message(self) -> str:
        """The text for the client or the operator. Holds no secret and no other tenant's data."""
        return str(self.args[0]) if self.args else type(self).__name__

    def __str__(self) -> str:
        return self.message


class InvalidRequest(BespokeError):
    """The request breaks a rule; `param` names the field and `code` the rule, as OpenAI's errors do."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.param = param
        self.code = code


class BodyTooLarge(InvalidRequest):
    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request body is larger than the limit of {limit_bytes} bytes.")
        self.args = (limit_bytes,)
        self.code = "request_too_large"
        self.limit_bytes = limit_bytes

    @property
    def message(self) -> str:
        return f"The request body is larger than the limit of {self.limit_bytes} bytes."


class BodyTimeout(InvalidRequest):
    def __init__(self, limit_s: float) -> None:
        super().__init__("", None, "request_timeout")
        self.args = (limit_s,)
        self.limit_s = limit_s

    @property
    def message(self) -> str:
        return f"The request body did not arrive within {self.limit_s:g} seconds."


class HeadersTooLarge(InvalidRequest):
    def __init__(self, limit_bytes: int) -> None:
        super().__init__("", None, "headers_too_large")
        self.args = (limit_bytes,)
        self.limit_bytes = limit_bytes

    @property
    def message(self) -> str:
        return f"The headers are larger than {self.limit_bytes} bytes."


class UnsupportedEncoding(InvalidRequest):
    def __init__(self, encoding: str) -> None:
        super().__init__("", "Content-Encoding", "unsupported_encoding")
        self.args = (encoding,)
        self.encoding = encoding

    @property
    def message(self) -> str:
        return f"Bodies may be sent as they are, or as gzip or deflate, not as '{self.encoding}'."


class ContextLengthExceeded(InvalidRequest):
    """`prompt_tokens` + `completion_tokens` (the requested maximum) exceed the model's context."""

    def __init__(self, context_tokens: int, prompt_tokens: int, completion_tokens: int, param: str) -> None:
        super().__init__("", param, "context_length_exceeded")
        self.args = (context_tokens, prompt_tokens, completion_tokens, param)
        self.context_tokens = context_tokens
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens

    @property
    def message(self) -> str:
        return (
            f"This model's maximum context length is {self.context_tokens} tokens. However, you requested "
            f"{self.prompt_tokens + self.completion_tokens} tokens ({self.prompt_tokens} in the messages, "
            f"{self.completion_tokens} in the completion)."
        )


class Unauthenticated(BespokeError):
    """The request has no key, or an invalid one. The message never says which part of a key was wrong."""

    def __init__(self, message: str = "Incorrect API key provided.") -> None:
        super().__init__(message)


class PermissionDenied(BespokeError):
    def __init__(self, scope: str) -> None:
        super().__init__(scope)
        self.scope = scope

    @property
    def message(self) -> str:
        return f"This API key lacks the scope '{self.scope}'."


class TenantSuspended(BespokeError):
    def __init__(self, message: str = "Your account is suspended.") -> None:
        super().__init__(message)


class NotFound(BespokeError):
    def __init__(self, message: str = "Not found.") -> None:
        super().__init__(message)


class MethodNotAllowed(NotFound):
    pass


class ModelNotFound(NotFound):
    """The model is unknown or another tenant's: the two cases must look the same to the client."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model = model

    @property
    def message(self) -> str:
        return f"The model '{self.model}' does not exist or you do not have access to it."


class ResponseNotFound(NotFound):
    """The response is unknown or another tenant's: the two cases must look the same to the client."""

    def __init__(self, response_id: str) -> None:
        super().__init__(response_id)
        self.response_id = response_id

    @property
    def message(self) -> str:
        return f"Response with id '{self.response_id[:64]}' not found."


class ItemNotFound(NotFound):
    """The item is unknown, not stored or another tenant's: the cases must look the same to the client."""

    def __init__(self, item_id: str) -> None:
        super().__init__(item_id)
        self.item_id = item_id

    @property
    def message(self) -> str:
        return (
            f"Item with id '{self.item_id[:128]}' not found. Items are not persisted when `store` is set to "
            "false. Try again with `store` set to true, or send the item itself."
        )


class IdempotencyConflict(BespokeError):
    """The first request with this key still runs. retry_after_s: when its answer can be there."""

    def __init__(self, retry_after_s: int = 1) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s

    @property
    def message(self) -> str:
        return (
            "A request with this Idempotency-Key is still running. "
            f"Please try again in {self.retry_after_s}s."
        )


class InsufficientCredit(BespokeError):
    """The tenant's credit does not cover the request's highest possible cost."""

    def __init__(self, tenant: str, needed_nanos: int, available_nanos: int, currency: str) -> None:
        super().__init__(tenant, needed_nanos, available_nanos, currency)
        self.tenant = tenant
        self.needed_nanos = needed_nanos
        self.available_nanos = available_nanos
        self.currency = currency

    @property
    def message(self) -> str:
        return (
            "You exceeded your current quota: this request may cost up to "
            f"{self.needed_nanos} nano-{self.currency} and {max(self.available_nanos, 0)} are available."
        )


class BudgetExceeded(InsufficientCredit):
    """A hard budget leaves less than the request may cost. scope: "tenant", "project" or "key"."""

    def __init__(
        self,
        scope: str,
        period: str,
        limit_nanos: int,
        needed_nanos: int,
        available_nanos: int,
        currency: str,
    ) -> None:
        super().__init__(scope, needed_nanos, available_nanos, currency)
        self.args = (scope, period, limit_nanos, needed_nanos, available_nanos, currency)
        self.scope = scope
        self.period = period
        self.limit_nanos = limit_nanos

    @property
    def message(self) -> str:
        owner = {"tenant": "your account's", "project": "your project's", "key": "this API key's"}[self.scope]
        period = "" if self.period == "total" else f" {self.period}"
        return (
            f"You exceeded your current quota: {owner}{period} budget of {self.limit_nanos} "
            f"nano-{self.currency} has {self.available_nanos} left, "
            f"and this request may cost up to {self.needed_nanos}."
        )


class NotBillable(BespokeError):
    """No price plan is in force for the tenant, so nothing may be sold to it."""

    def __init__(self, tenant: str) -> None:
        super().__init__(tenant)
        self.tenant = tenant

    @property
    def message(self) -> str:
        return "Your account is not active: no price plan is in force for it."


class RequestQuarantined(BespokeError):
    def __init__(
        self,
        message: str = (
            "A model stopped while it worked on this same request, so the request is refused for 10 minutes."
        ),
    ) -> None:
        super().__init__(message)


class RateLimited(BespokeError):
    """A limit of the tenant or the key does not allow this request now.

    what: "requests", "tokens" (both per minute) or "concurrent requests". retry_after_s: None if waiting
    does not help, because the request alone is larger than the limit.
    """

    def __init__(self, what: str, limit: int, used: int, requested: int, retry_after_s: int | None) -> None:
        super().__init__(what, limit, used, requested, retry_after_s)
        self.what = what
        self.limit = limit
        self.used = used
        self.requested = requested
        self.retry_after_s = retry_after_s

    @property
    def message(self) -> str:
        rates = {"requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)"}
        name = rates.get(self.what, self.what)
        if self.retry_after_s is None:
            return f"Request too large for {name}: Limit {self.limit}, Requested {self.requested}."
        return (
            f"Rate limit reached for {name}: Limit {self.limit}, Used {self.used}, "
            f"Requested {self.requested}. Please try again in {self.retry_after_s}s."
        )


class Unavailable(BespokeError):
    def __init__(self, message: str, retry_after_s: int = 5) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s


class EngineUnavailable(Unavailable):
    def __init__(
        self, message: str = "The model is not available right now.", retry_after_s: int = 10
    ) -> None:
        super().__init__(message, retry_after_s)


class EngineLost(EngineUnavailable):
    """The replica died that had the request or was about to get it."""


class Overloaded(Unavailable):
    def __init__(
        self, message: str = "The server is at capacity; please retry.", retry_after_s: int = 2
    ) -> None:
        super().__init__(message, retry_after_s)


class StoreUnavailable(Unavailable):
    def __init__(
        self, message: str = "The service is temporarily unavailable.", retry_after_s: int = 5
    ) -> None:
        super().__init__(message, retry_after_s)


class EngineFailed(BespokeError):
    def __init__(self, message: str = "The model stopped before the answer was complete.") -> None:
        super().__init__(message)


class ClientGone(BespokeError):
    def __init__(self, message: str = "The client closed the connection.") -> None:
        super().__init__(message)


class OperatorError(BespokeError):
    pass


class AlreadyExists(OperatorError):
    pass


class UnknownRecord(OperatorError):
    pass


class RegistryError(OperatorError):
    pass


class Conflict(OperatorError):
    pass


class ReconciliationFailed(OperatorError):
    pass
