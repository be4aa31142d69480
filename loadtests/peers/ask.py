"""One streamed chat completion: what was counted, and when its first token came."""

import json
import time
from dataclasses import dataclass

import httpx

from loadtests.peers.server import Server


@dataclass(frozen=True)
class Answer:
    text: str
    ttft_s: float
    prompt_tokens: int
    completion_tokens: int


def ask(server: Server, model: str, question: str, *, tokens: int) -> Answer:
    """Asks for exactly `tokens` tokens. Raises ValueError if the stream ends without usage."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Authorization": f"Bearer {server.key}"}
    text, usage, started_s, ttft_s = "", None, time.perf_counter(), 0.0
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120, trust_env=False) as answer:
        if answer.is_error:
            raise ValueError(f"{answer.status_code}: {answer.read().decode(errors='replace')}")
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            for choice in event["choices"]:
                part = choice["delta"].get("content") or ""
                if part and not text:
                    ttft_s = time.perf_counter() - started_s
                text += part
            usage = event.get("usage") or usage
    if usage is None:
        raise ValueError("The stream ended without usage.")
    return Answer(text, ttft_s, usage["prompt_tokens"], usage["completion_tokens"])
