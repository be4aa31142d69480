"""Checks how requests and probes end in the real engine: nothing is left, nothing counted in excess."""

import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from finetune.errors import FinetuneError
from serve.engine.protocol import Finished, GenerationRequest, Sampling, Texts
from tests.support.engine_host import MEMORY, EngineHost, events_of, until
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("samples", [1, 3])
def test_an_aborted_request_leaves_nothing_in_vllm(host: EngineHost, samples: int) -> None:
    processor = host.engine._llm.output_processor

    async def scenario() -> None:
        sampling = Sampling(completion_tokens_max=500, n=samples, logit_bias=((2, -100.0),))
        request = GenerationRequest(f"aborted-{samples}", None, Texts(("Rain on",)), sampling, "salt")
        ended = False
        async for batch in events_of(host.engine, request):
            await host.engine.abort(request.request_id)
            ended = ended or any(isinstance(event, Finished) and event.aborted for event in batch)
        assert ended

        async def idle() -> bool:
            return not processor.has_unfinished_requests()

        await until(idle)

    host.run(scenario())
    assert (dict(processor.parent_requests), dict(processor.request_states)) == ({}, {})
    assert not processor.external_req_ids


def test_an_adapter_that_is_not_wanted_leaves_its_slot_though_memory_has_evicted_it(host: EngineHost) -> None:
    """One that a long request used until just now has a slot, and is the longest untouched in memory."""
    long, *others = (host.publish(f"slot{number}", 300 + number) for number in range(MEMORY + 1))

    async def scenario() -> None:
        request_id, events = host.stream(long, "Rain on", 500)
        await anext(events)
        for adapter in others[:-1]:
            await host.answer(adapter, "Rain on", 2)
        await host.engine.abort(request_id)
        async for _ in events:
            pass
        await host.answer(others[-1], "Rain on", 2)
        assert long.id not in host.engine.loaded_adapters
        await host.engine.apply_desired(frozenset(), [])

    host.run(scenario())
    assert host.counters().residency.slots == 0


def test_a_probe_that_does_not_begin_is_not_counted(host: EngineHost) -> None:
    adapter = host.publish("spoilt", 77)
    shutil.rmtree(adapter.path(host.adapters_dir))
    before = host.counters()
    with pytest.raises((FinetuneError, OSError)):
        host.run(host.engine.logprobs(adapter))
    after = host.counters()
    assert (after.probe_prompt_tokens, after.probe_completion_tokens) == (
        before.probe_prompt_tokens,
        before.probe_completion_tokens,
    )


def test_a_process_of_vllms_ends_with_the_one_that_has_started_it() -> None:
    """The process is started as vLLM starts its core, and killed by SIGKILL."""
    script = (
        "import multiprocessing, time\n"
        "from serve.vllm_plugin import end_with_parent\n"
        "def core():\n    end_with_parent()\n    print('up', flush=True)\n    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('fork').Process(target=core)\n"
        "    process.start()\n    print(process.pid, flush=True)\n    process.join()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as replica:
        assert replica.stdout is not None
        lines = {replica.stdout.readline().strip(), replica.stdout.readline().strip()}
        (pid,) = map(int, lines - {"up"})
        assert psutil.pid_exists(pid)
        os.kill(replica.pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", 10)
