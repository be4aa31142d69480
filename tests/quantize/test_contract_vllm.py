"""vLLM loads a published NF4 base, and computes the logits that transformers computes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.card import BaseCard
from quantize.evaluate import load_for_scoring

pytestmark = pytest.mark.slow

CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def engine(tiny: Path, tiny_nf4: BaseCard) -> Iterator[Any]:
    """vLLM, running the NF4 base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the scheduler runs in this process
        vllm = pytest.importorskip("vllm")
        llm = vllm.LLM(
            str(tiny.parent / tiny_nf4.name), enforce_eager=True, max_model_len=512, max_num_seqs=4
        )
        yield llm
        llm.llm_engine.engine_core.shutdown()
        vllm.envs.disable_envs_cache()  # the engine's core has cached this process's environment


def logprobs(directory: Path, token_ids: list[int], *, quantized: bool) -> torch.Tensor:
    """Returns the log-probability that transformers gives each token but the first, shape (tokens - 1,)."""
    model = load_for_scoring(directory, quantized=quantized)
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def test_vllm_serves_exactly_the_nf4_weights(engine: Any, tiny: Path, tiny_nf4: BaseCard) -> None:
    from vllm import SamplingParams

    (answer,) = engine.chat(CHAT, SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0))
    token_ids = list(answer.prompt_token_ids)
    served = torch.tensor([next(iter(at.values())).logprob for at in answer.prompt_logprobs[1:]])
    from_nf4 = served - logprobs(tiny.parent / tiny_nf4.name, token_ids, quantized=True)
    from_parent = served - logprobs(tiny, token_ids, quantized=False)
    assert from_nf4.abs().max() < 0.01  # bfloat16 arithmetic on logits of size 0.2
    assert from_nf4.abs().mean() < from_parent.abs().mean() / 4
    assert len(answer.outputs[0].token_ids) == 4
