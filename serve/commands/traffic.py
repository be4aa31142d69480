"""The demo's client traffic: the official openai client, both tenants at once."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import openai


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and the answer that the customer's data taught."""

    text: str
    taught: str


@dataclass(frozen=True, slots=True)
class Customer:
    tenant: str
    key: str
    model: str
    questions: Sequence[Question]


@dataclass(frozen=True, slots=True)
class Exchange:
    tenant: str
    model: str
    streamed: bool
    question: Question
    answer: str


def converse(url: str, customers: Sequence[Customer], base: str) -> list[Exchange]:
    """Asks every customer's questions, all at the same time: of its own model, streaming and not, and of
    the bare base. Decoding is greedy, so a question has one answer."""

    def ask(customer: Customer, question: Question, model: str, streamed: bool) -> Exchange:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=customer.key, timeout=300)
        with client:
            text = _streamed(client, model, question) if streamed else _whole(client, model, question)
        return Exchange(customer.tenant, model, streamed, question, text)

    jobs = [
        (customer, question, model, streamed)
        for question in range(max(len(customer.questions) for customer in customers))
        for customer in customers
        for model, streamed in ((customer.model, True), (customer.model, False), (base, False))
        if question < len(customer.questions)
    ]
    with ThreadPoolExecutor(8) as pool:
        futures = [
            pool.submit(ask, customer, customer.questions[question], model, streamed)
            for customer, question, model, streamed in jobs
        ]
        return [future.result() for future in futures]


def hang_up(url: str, customer: Customer) -> int:
    """Opens a stream, reads a few pieces and leaves, as impatient users do. Returns the number of pieces."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=customer.key, timeout=300) as client:
        stream = client.chat.completions.create(
            model=customer.model,
            messages=[{"role": "user", "content": "Tell me a very long story about the sea."}],
            max_tokens=400,
            stream=True,
        )
        read = 0
        for _ in stream:
            read += 1
            if read == 5:
                break
        stream.close()
    return read


def _whole(client: openai.OpenAI, model: str, question: Question) -> str:
    completion = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question.text}],
        max_tokens=48,
        temperature=0,
    )
    return completion.choices[0].message.content or ""


def _streamed(client: openai.OpenAI, model: str, question: Question) -> str:
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question.text}],
        max_tokens=48,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
