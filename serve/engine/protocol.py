"""Defines the protocol between the gateway and an engine: typed requests in, typed events out.

An engine answers a request with one Accepted, then Deltas, then one Finished, or raises an exception. The
engine counts tokens from their ids and sends the counts with the events, so no text is parsed to bill it.
Events are msgspec's structs, because one is made, sent and read for each token (`transport`). After `abort`
the last event is Finished too, with the counts until then.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from serve.billing.metering.terms import RequestUsage
from serve.registry.versions import AdapterVersion


@dataclass(frozen=True, slots=True)
class JsonFormat:
    """Asks for JSON: of `schema` (JSON Schema as JSON text), or any object if it is None.

    `param` is the client's own name for the schema's place, for error messages.
    """

    schema: str | None = None
    param: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class TextFormat:
    """Asks for a text that a regular expression matches as a whole, or for one of `choices`.

    `param` is the client's own name for it, for error messages.
    """

    regex: str | None = None
    choices: tuple[str, ...] = ()
    param: str = field(default="structured_outputs", compare=False)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Says how to choose tokens. `completion_tokens_max` None means: as many as the context allows.

    A prompt that leaves less of the context gets what it leaves. With 0 the answer is empty, and no
    completion is counted.

    `logprobs` is how many of the likeliest tokens each token is sent with; None means no log-probabilities at
    all. With `echo` each choice begins with the prompt, whose tokens are not counted as completion. Before
    `completion_tokens_min`, and with `ignore_eos`, the model's own end of an answer is not taken.
    """

    completion_tokens_max: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    echo: bool = False
    format: JsonFormat | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    text_format: TextFormat | None = None
    completion_tokens_min: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Calls a function on the model's behalf: whole in a conversation, in pieces in a stream.

    Pieces with the same `index` belong together: `id` and `name` come once, `arguments` (JSON text) add up.
    """

    index: int = 0
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """Holds one turn of a conversation.

    An assistant's may hold tool calls instead of content. A tool's answers `tool_call_id`.
    """

    role: str
    content: str | None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """Describes a function that the model may call. `parameters` is JSON Schema as JSON text.

    `param` is the client's own name for the schema's place, for error messages.
    """

    name: str
    description: str | None = None
    parameters: str | None = None
    strict: bool | None = None
    param: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Toolbox:
    """Holds the tools of a request. `choice` is auto, none or required; `function` is the one to call."""

    tools: tuple[Tool, ...]
    choice: str = "auto"
    function: str | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class Texts:
    """Holds prompts that are continued as they stand, each given as text or as token ids."""

    prompts: tuple[str | tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Pooling:
    """Asks for one vector for each text, instead of a continuation.

    With `dimensions` only the vector's first numbers are taken, and made as long as before. A text of more
    than `truncate_tokens` is cut to them; None refuses what the context cannot hold, -1 cuts to the context.
    """

    dimensions: int | None = None
    truncate_tokens: int | None = None


# Over all texts of one request that makes embeddings: OpenAI's bound.
EMBEDDING_TOKENS_MAX = 300_000

Prompt = tuple[Message, ...] | Texts


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Asks an engine to continue `prompt`: a conversation, or texts that are continued as they stand.

    Choices are numbered prompt by prompt: choice i·n + j is the j-th sample of the i-th text.
    `cache_salt` keeps one tenant from probing the prefix cache of another.
    With `collect` each choice comes in one piece once it is complete; its counts come as they arise.
    `context_tokens_max` narrows the engine's own context. `trace_headers` name the parent of the engine's own
    spans (W3C Trace Context), if there is one. With `count_only` the prompt is rendered and counted, and
    nothing is generated. With `pooling` there is one choice for each text, and the choice's Delta carries a
    vector.
    """

    request_id: str
    adapter: AdapterVersion | None
    prompt: Prompt
    sampling: Sampling
    cache_salt: str
    toolbox: Toolbox | None = None
    reasoning_effort: str | None = None
    collect: bool = False
    context_tokens_max: int | None = None
    trace_headers: Mapping[str, str] | None = None
    count_only: bool = False
    pooling: Pooling | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Holds a token's bytes, which may be a part of a character, with its natural-log probability.

    That is None for a prompt's first token, which follows nothing. `top` holds the likeliest tokens at this
    position with theirs, the likeliest first.
    """

    token: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] = ()


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag="a", gc=False):
    """Confirms that the engine has the request. `replica` and `boot` name the process that counts it.

    `cold_loads` is 1 if its adapter had to be loaded into memory first. `completion_tokens_max` is how many
    tokens a choice may have: what was asked for, or what the prompt leaves of the context if that is less.
    """

    replica: str
    boot: str
    prompt_tokens: int
    cold_loads: int = 0
    completion_tokens_max: int | None = None


class Delta(msgspec.Struct, frozen=True, array_like=True, tag="d", gc=False):
    """Carries the new text of one choice and the number of its tokens (a token may add no text yet).

    `stop_sequence` is the one of the request's stop sequences that ended the choice. `embedding` is a text's
    vector, as little-endian float32.
    """

    index: int
    text: str
    tokens: int
    finish_reason: str | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    stop_sequence: str | None = None
    embedding: bytes = b""


class Finished(msgspec.Struct, frozen=True, array_like=True, tag="f", gc=False):
    """Ends the request. Counts are totals over all choices.

    It ended early if `aborted`, on somebody's request, or `failed`, by an error of the engine.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    aborted: bool
    failed: bool = False


Event = Accepted | Delta | Finished
Take = Callable[[list[Event]], None]


@dataclass(frozen=True, slots=True)
class Residency:
    """Counts a replica's adapters by tier, and loads and evictions. Each tier includes those before it."""

    slots: int = 0
    memory: int = 0
    disk: int = 0
    memory_loads: int = 0
    memory_load_s: float = 0.0
    memory_evictions: int = 0
    slot_loads: int = 0
    slot_load_s: float = 0.0
    slot_evictions: int = 0
    waiting: int = 0
    wait_s_max: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """Holds vLLM's own figures of its load. `kv_used` is a share of 1; `prefix_*` count prompt tokens."""

    waiting: int = 0
    kv_used: float = 0.0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


GRAMMAR_CPU_S_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True, slots=True)
class GrammarCounts:
    """Counts a replica's new grammars by what became of them, and those that wait.

    `buckets` counts them by the CPU they took: one for each of GRAMMAR_CPU_S_BUCKETS, and one above.
    """

    wrong: int = 0
    too_complex: int = 0
    overloads: int = 0
    waiting: int = 0
    cpu_s: float = 0.0
    buckets: tuple[int, ...] = (0,) * (len(GRAMMAR_CPU_S_BUCKETS) + 1)


@dataclass(frozen=True, slots=True)
class Counters:
    """Holds an engine process's own lifetime counters, as vLLM keeps them.

    `probe_*` is the part that no customer is billed for: checks of the base and of adapters, and the token
    that vLLM generates where a client asks for none.
    """

    base: str
    replica: str
    boot: str
    prompt_tokens: int
    completion_tokens: int
    probe_prompt_tokens: int
    probe_completion_tokens: int
    running: int
    residency: Residency = Residency()
    load: Load = Load()
    grammars: GrammarCounts = GrammarCounts()


class Engine(Protocol):
    """Serves one base model to a gateway."""

    @property
    def context_tokens_max(self) -> int:
        """The longest prompt + completion that the engine takes, in tokens."""

    @property
    def embedding_size(self) -> int | None:
        """The length of the vectors that the base makes; None for a base that generates text."""

    async def generate(self, request: GenerationRequest, take: Take) -> None:
        """Gives `take` the events in batches, as the engine's steps produce them. Returns after Finished.

        It calls `take` in the event loop, for each step and request, so `take` must not block.

        Raises:
            ContextLengthExceeded: before Accepted.
            EngineUnavailable, Overloaded: before Accepted; nothing was computed.
            EngineFailed: after Accepted; what was delivered so far stands.
        """

    async def abort(self, request_id: str) -> None:
        """Stops generating; Finished is the last event. Unknown ids are ignored."""

    async def final_usage(self, request_id: str) -> list[RequestUsage]:
        """Ends the request for good, also if it has not begun, and returns its final counts.

        Empty if no live replica has worked on it. Raises EngineUnavailable if a replica does not answer.
        """

    async def counters(self) -> list[Counters]:
        """One entry per live replica. Raises EngineUnavailable."""
