"""What is asked: prompts of one length in tokens, the same body for every server."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Equally long in tokens.
TOPICS = ("town in winter", "boat in autumn", "house in spring", "train in summer")
EOS_BIAS = -100  # OpenAI's "never"


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count for goodput; the second holds for its own 99th percentile."""

    ttft_ms: float
    itl_p99_ms: float


@dataclass(frozen=True, slots=True)
class Work:
    """One kind of load: so many streams that each ask again as soon as they are answered."""

    name: str
    streams: int
    requests: int
    tokens: int
    mixed: bool  # over the base and all adapters in turn; else the base alone
    slo: Slo


def prompt(batch: int, number: int) -> str:
    """Numbered with a fixed width: SmolLM2's tokenizer makes one token of each digit."""
    topic = TOPICS[number % len(TOPICS)]
    told = f"Story {batch:04d} {number:04d}. Tell all of it, with names and places;"
    return f"{told} do not stop before the end: a {topic}."


def body(
    model: str, text: str, *, tokens: int, end_tokens: tuple[int, ...] = (), length: str = "max_tokens"
) -> dict[str, Any]:
    """A streamed, greedy request that ends after exactly `tokens` tokens.

    `ignore_eos` is vLLM's own, so ours refuses it; a bias against the end tokens does the same.
    """
    asked: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        length: tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if end_tokens:
        asked["logit_bias"] = {str(token): EOS_BIAS for token in end_tokens}
    return asked


def end_tokens(base_dir: Path) -> tuple[int, ...]:
    """What a base's generation stops at; none for a random one, which has no reason to say it."""
    if json.loads((base_dir / "card.json").read_text())["source"].startswith("random"):
        return ()
    told = json.loads((base_dir / "generation_config.json").read_text())["eos_token_id"]
    return tuple(told) if isinstance(told, list) else (told,)


def bodies(
    work: Work, models: tuple[str, ...], batch: int, ends: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """The requests of one turn; another `batch` is other prompts, which no prefix cache knows."""
    names = models if work.mixed else models[:1]
    for number in range(work.requests):
        text = prompt(batch, number)
        yield body(names[number % len(names)], text, tokens=work.tokens, end_tokens=ends)
