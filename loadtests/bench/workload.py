"""Makes the requests: prompts of one length in tokens, the same body for every server."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# All of the same length in tokens.
TOPICS = ("town in winter", "boat in autumn", "house in spring", "train in summer")
EOS_BIAS = -100  # OpenAI's value for "never"


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds the latency of a request that counts for goodput; `itl_p99_ms` is of its own gaps."""

    ttft_ms: float
    itl_p99_ms: float


@dataclass(frozen=True, slots=True)
class Workload:
    """Describes one kind of load: `streams` clients that each ask again as soon as they are answered."""

    name: str
    streams: int
    requests: int
    tokens: int
    mixed: bool  # the base and all adapters in turn; otherwise the base alone
    slo: Slo


def prompt(batch: int, number: int) -> str:
    """Returns a numbered prompt. SmolLM2 has a token for each digit, so numbers have a fixed width."""
    topic = TOPICS[number % len(TOPICS)]
    opening = f"Story {batch:04d} {number:04d}. Tell all of it, with names and places;"
    return f"{opening} do not stop before the end: a {topic}."


def body(
    model: str, text: str, *, tokens: int, end_tokens: tuple[int, ...] = (), length: str = "max_tokens"
) -> dict[str, Any]:
    """Returns a streamed, greedy request that ends after exactly `tokens` tokens.

    A bias against the end tokens keeps the model from stopping. `ignore_eos` would too, but it is vLLM's
    own and our server refuses it.
    """
    fields: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        length: tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if end_tokens:
        fields["logit_bias"] = {str(token): EOS_BIAS for token in end_tokens}
    return fields


def end_tokens(base_dir: Path) -> tuple[int, ...]:
    """Returns the tokens at which a base stops; none for a random base, which hardly ever emits them."""
    if json.loads((base_dir / "card.json").read_text())["source"].startswith("random"):
        return ()
    eos = json.loads((base_dir / "generation_config.json").read_text())["eos_token_id"]
    return tuple(eos) if isinstance(eos, list) else (eos,)


def bodies(
    workload: Workload, models: tuple[str, ...], batch: int, ends: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """Yields the requests of one turn. Another `batch` has other prompts, which no prefix cache knows."""
    names = models if workload.mixed else models[:1]
    for number in range(workload.requests):
        text = prompt(batch, number)
        yield body(names[number % len(names)], text, tokens=workload.tokens, end_tokens=ends)
