"""Builds each suite's command line. Arguments that our command does not know are added to it."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loadtests.peers.environment import ROOT, environment

HERE = Path(__file__).parent
# lm-eval needs three small packages that exist only as source. pip builds them when it makes the environment.
WITHOUT_WHEELS = ("rouge-score", "sqlitedict", "word2number")
RANDOM_PROMPTS, RANDOM_TOKENS = 20, 32


@dataclass(frozen=True)
class Gateway:
    """Names a gateway, a key, a model, and the folder with the model's tokenizer."""

    url: str
    key: str
    model: str
    tokenizer: Path


Command = tuple[list[str], dict[str, str]]  # a command line, and variables


def langchain(target: Gateway, scratch: Path) -> Command:
    """LangChain's standard tests of chat models, for langchain-openai and langchain-anthropic."""
    bin_folder = environment("langchain", folder=HERE)
    suite = HERE / "langchain_standard.py"
    command = [str(bin_folder / "python"), "-m", "pytest", str(suite), "-q", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(scratch), "--confcutdir", str(scratch), "-c", "/dev/null"]
    # One event loop: the clients keep their connections from test to test.
    scopes = (f"asyncio_default_{kind}_loop_scope=session" for kind in ("test", "fixture"))
    loops = ("asyncio_mode=auto", *scopes)
    command += ["--tb", "short", *(argument for option in loops for argument in ("-o", option))]
    variables = {"BESPOKE_URL": target.url, "BESPOKE_KEY": target.key, "BESPOKE_MODEL": target.model}
    return command, variables | {"LANGSMITH_TRACING": "false"}


def lm_eval(target: Gateway, scratch: Path) -> Command:
    """lm-eval's generation by chat, on a task of five questions that lies here."""
    bin_folder = environment("lm-eval", folder=HERE, without_wheels=WITHOUT_WHEELS)
    task = json.loads((HERE / "lm_eval" / "task.json").read_text())
    task["dataset_kwargs"] = {"data_files": {"test": str(HERE / "lm_eval" / "questions.jsonl")}}
    (scratch / "bespoke_questions.yaml").write_text(json.dumps(task))  # JSON is YAML
    url = f"{target.url}/v1/chat/completions"
    arguments = f"model={target.model},base_url={url},num_concurrent=2,max_retries=1"
    command = [str(bin_folder / "lm_eval"), "run", "--model", "local-chat-completions"]
    command += ["--model_args", arguments, "--tasks", "bespoke_questions", "--include_path", str(scratch)]
    command += ["--apply_chat_template", "--output_path", str(scratch)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(scratch)}
    return command, offline | {"OPENAI_API_KEY": target.key}


def vllm_bench(target: Gateway, scratch: Path) -> Command:
    """vLLM's `bench serve` as it comes, on its random data set."""
    command = [sys.executable, "-m", "loadtests.drives.vllm_bench", "--backend", "openai-chat"]
    command += ["--base-url", target.url, "--endpoint", "/v1/chat/completions", "--model", target.model]
    command += ["--tokenizer", str(target.tokenizer.resolve()), "--dataset-name", "random"]
    command += ["--random-input-len", str(RANDOM_TOKENS), "--random-output-len", str(RANDOM_TOKENS)]
    command += ["--num-prompts", str(RANDOM_PROMPTS), "--disable-tqdm"]
    variables = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
    return command, variables | {"OPENAI_API_KEY": target.key}


SUITES: dict[str, Callable[[Gateway, Path], Command]] = {
    "langchain": langchain,
    "lm-eval": lm_eval,
    "vllm-bench": vllm_bench,
}
