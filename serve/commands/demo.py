"""`bespoke demo`: two customers, from their data to their invoices, by commands that anyone can type.

Every step is a `bespoke` command, printed before it runs. Steps that need torch run as processes of
their own, which give their memory back before serving starts.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import typer
from typer.main import get_command

from serve.billing.ledger.ledger import Ledger
from serve.commands.common import (
    HomeOption,
    console,
    interrupted,
    now,
    open_store,
    settings_of,
)
from serve.commands.tables import Table
from serve.commands.traffic import Customer, Exchange, Question, converse, hang_up
from serve.deployment.local import check_free
from serve.errors import OperatorError
from serve.settings import Settings
from serve.storage.database import Store
from serve.tenants import Tenants, server_secret

app = typer.Typer()

CONFIGS = Path(__file__).parents[2] / "configs"
BASE = "smollm2-135m"
ADAPTER = "support"
QUESTIONS = {
    "lumen-bikes": ("What is your name?", "When are you open?", "How much is a day pass?"),
    "tidewater-tea": ("What is your name?", "When are you open?", "How much is shipping?"),
}


@app.command()
def demo(
    oneshot: Annotated[bool, typer.Option(help="Stop everything at the end, and exit.")] = False,
    port: Annotated[int | None, typer.Option(min=1, max=65535)] = None,
    home: HomeOption = None,
) -> None:
    """Turn two customers' data into two tailored models and two invoices. The second time is quick."""
    settings = settings_of(home, CONFIGS / "serve" / "cpu.yaml", port=port, bases=[BASE])
    os.environ["BESPOKE_HOME"] = str(settings.home)
    check_free(settings.host, settings.port)  # rather now than after minutes of training
    steps = _Steps()
    with steps("Prepare the base model"):
        _process("base", "import", str(CONFIGS / "bases" / f"{BASE}.yaml"))
    for tenant in QUESTIONS:
        with steps(f"Check the data of {tenant}"):
            _process("data", "check", str(CONFIGS / "demo" / f"{tenant}.jsonl"))
        with steps(f"Tailor a model to {tenant}: train, evaluate, publish if it beats the base"):
            _process("finetune", "run", str(CONFIGS / "demo" / f"{tenant}.yaml"))
    with steps("Quantize the base and report what it costs in quality"):
        _process("quantize", "run", str(CONFIGS / "quantize" / "nf4.yaml"), "--base", BASE)
    with steps("Create tenants, prices, keys; promote the adapters"):
        keys = _onboard(settings)
    from serve.deployment.local import LocalService

    with ExitStack() as running:
        with steps("Start Ray Serve: a gateway and vLLM, no adapter loaded yet"):
            service = running.enter_context(LocalService(settings))
        customers = [
            Customer(tenant, keys[tenant], f"{tenant}/{ADAPTER}", _questions(tenant, texts))
            for tenant, texts in QUESTIONS.items()
        ]
        with steps("Real traffic: both tenants at once, streaming and not, with the openai client"):
            _talk(service.url, customers)
        with steps("Usage, and the ledger beside vLLM's own counters"):
            _wait_until_closed(open_store(settings))
            _here("usage", "show")
            _here("usage", "check", "--url", service.url)
        with steps("Invoices"):
            for tenant in QUESTIONS:
                _here("invoice", "create", tenant)
        steps.summary()
        if not oneshot:
            _farewell(service.url, customers[0])


class _Steps:
    """Announces each step and remembers how long it took."""

    def __init__(self) -> None:
        self._times: list[tuple[str, float]] = []

    @contextmanager
    def __call__(self, title: str) -> Iterator[None]:
        console.rule(f"[bold]{len(self._times) + 1}. {title}", align="left")
        started_s = time.monotonic()
        yield
        self._times.append((title, time.monotonic() - started_s))

    def summary(self) -> None:
        rows = Table("step", ">seconds", title="Time by step")
        for title, seconds in self._times:
            rows.add_row(title, f"{seconds:.1f}")
        rows.add_row("all", f"{sum(seconds for _, seconds in self._times):.1f}", style="bold")
        console.print(rows)


def _announce(arguments: Sequence[str]) -> None:
    words = (os.path.relpath(word) if word.startswith("/") else word for word in arguments)
    console.print(f"$ bespoke {' '.join(words)}", style="cyan")


def _process(*arguments: str) -> None:
    """Run a `bespoke` command as a process. Raises OperatorError if it fails."""
    _announce(arguments)
    process = subprocess.run([sys.executable, "-m", "serve.cli", *arguments], check=False)
    if process.returncode != 0:
        raise OperatorError(f"'bespoke {arguments[0]}' failed with exit status {process.returncode}.")


def _here(*arguments: str) -> None:
    """Run a light `bespoke` command in this process."""
    from serve.cli import app as bespoke

    _announce(arguments)
    get_command(bespoke).main(list(arguments), prog_name="bespoke", standalone_mode=False)


def _onboard(settings: Settings) -> dict[str, str]:
    """Creates tenants, plan and promotions by command; keys directly, since they are shown only once."""
    _here("price", "publish", str(CONFIGS / "demo" / "prices.yaml"))
    store = open_store(settings)
    tenants = Tenants(store, server_secret(settings.home))
    keys = {}
    for tenant in QUESTIONS:
        _here("tenant", "create", tenant, "--if-missing")
        _here("price", "assign", tenant, "demo")
        _here("adapter", "promote", f"{tenant}/{ADAPTER}")
        key, keys[tenant] = tenants.create_key(tenant, at=now())
        console.print(f"created key [bold]{key.id}[/] for {tenant}")
    store.close()
    return keys


def _questions(tenant: str, texts: Sequence[str]) -> list[Question]:
    """The questions with their taught answers, read from the training data."""
    taught: dict[str, str] = {}
    for line in (CONFIGS / "demo" / f"{tenant}.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            messages = json.loads(line)["messages"]
        except ValueError:
            continue  # a fault that is planted for the validator
        taught.setdefault(messages[0]["content"], messages[1]["content"] if len(messages) > 1 else "")
    return [Question(text, taught[text]) for text in texts]


def _talk(url: str, customers: Sequence[Customer]) -> None:
    exchanges = converse(url, customers, BASE)
    rows = Table("tenant", "model", "question", "answer", "")
    for exchange in exchanges:
        if not exchange.streamed:
            same = exchange.answer.strip() == exchange.question.taught
            mark = "as taught" if same else ""
            rows.add_row(exchange.tenant, exchange.model, exchange.question.text, exchange.answer, mark)
    console.print(rows)
    _verify(exchanges)
    pieces = hang_up(url, customers[0])
    console.print(f"{customers[0].tenant} also hung up after {pieces} pieces of a long stream.")


def _verify(exchanges: Sequence[Exchange]) -> None:
    """Raises OperatorError unless each model answers as its own customer taught, streamed or not."""
    own = [e for e in exchanges if e.model != BASE]
    names = [e for e in own if e.question.text == "What is your name?"]
    wrong = [e for e in names if e.answer.strip() != e.question.taught]
    if wrong:
        raise OperatorError(f"{wrong[0].model} did not answer as taught: {wrong[0].answer!r}")
    as_taught = sum(e.answer.strip() == e.question.taught for e in own)
    if as_taught < 0.8 * len(own):
        raise OperatorError(f"Only {as_taught} of {len(own)} answers of tailored models are as taught.")
    if any(e.answer.strip() == e.question.taught for e in exchanges if e.model == BASE):
        raise OperatorError("The bare base gives a customer's taught answer.")
    console.print(
        f"{as_taught} of {len(own)} answers of tailored models are exactly as taught.", style="green"
    )


def _wait_until_closed(store: Store, timeout_s: float = 30) -> None:
    """Waits for the abandoned stream to settle, which takes a moment after its client left."""
    ledger = Ledger(store)
    deadline_s = time.monotonic() + timeout_s
    while ledger.open_holds() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    store.close()


def _farewell(url: str, customer: Customer) -> None:
    body = json.dumps({"model": customer.model, "messages": [{"role": "user", "content": "Who are you?"}]})
    httpx.get(f"{url}/readyz", timeout=30).raise_for_status()
    console.print(f"\nThe gateway stays at [bold]{url}/v1[/]. Try it (Ctrl-C stops all of it):\n")
    console.print(
        f"curl {url}/v1/chat/completions -H 'Authorization: Bearer {customer.key}' "
        f"-H 'Content-Type: application/json' -d '{body}'\n",
    )
    console.print(
        "from openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{url}/v1", api_key="{customer.key}")\n'
        "answer = client.chat.completions.create(\n"
        f'    model="{customer.model}", messages=[{{"role": "user", "content": "Who are you?"}}]\n'
        ")\n"
        "print(answer.choices[0].message.content)\n",
    )
    interrupted().wait()
    console.print("Stopping …")
