"""Processes get their roles, and the front end's CPU is summed from them."""

import subprocess
import sys

import pytest

from loadtests.bench.processes import (
    ProcessFamily,
    cpu_used,
    front_end_s,
    idle_percent,
    is_engine,
    is_housekeeping,
    role,
)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("ray::ServeReplica:bespoke:gateway", "gateway"),
        ("ray::ServeReplica:bespoke:gateway.check_health", "gateway"),
        ("ray::SERVE_REPLICA::bespoke#engine-tiny#ubje:ServeReplica:bespoke:engine-tiny.__init__",
         "engine front (engine-tiny)"),
        ("ray::ServeReplica:bespoke:steward", "steward"),
        ("ray::ServeReplica:default:LLMServer:tiny", "LLMServer"),
        ("VLLM::EngineCore", "engine core"),
        ("VLLM::Worker", "worker"),
        ("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/s", "raylet"),
        ("/x/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp/s", "GCS"),
        ("/x/python -m vllm.entrypoints.openai.api_server --model /m", "API server"),
        ("/x/python -c from multiprocessing.resource_tracker import main;main(7)", "resource tracker"),
        ("/x/python -m serve.cli serve --port 1", "bespoke serve"),
        ("/c/peers/litellm-1/bin/python /c/peers/litellm-1/bin/litellm --config c", "LiteLLM"),
        ("/c/peers/vllm-router-1/bin/python /c/bin/vllm-router --worker-urls http://u", "vllm-router"),
        ("vllm::router", "vllm-router"),
        ("ray::DashboardAgent", "Ray's agents"),
        ("/usr/sbin/odd --flag", "odd"),
    ],
)  # fmt: skip
def test_a_process_is_known_by_its_title_or_its_command(command: str, name: str):
    assert role(command) == name


def test_the_front_end_is_everything_but_the_engine_and_rays_idling():
    cpu_s = {
        "gateway": 1.0,
        "engine front (engine-tiny)": 2.0,
        "worker": 9.0,
        "engine core": 8.0,
        "raylet": 0.5,
    }
    assert front_end_s(cpu_s, 10.0, {"raylet": 3.0, "gateway": 9.0}) == pytest.approx(1 + 2 + 0.5 - 0.3)
    assert front_end_s({"raylet": 0.1}, 10.0, {"raylet": 3.0}) == 0


def test_no_role_is_both_the_engine_and_housekeeping():
    for command in ("VLLM::Worker", "raylet", "ray::ServeReplica:bespoke:gateway"):
        assert not (is_engine(role(command)) and is_housekeeping(role(command)))


def test_a_familys_cpu_is_measured_and_one_that_has_ended_keeps_what_it_had():
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True)\ninput()"
    process = subprocess.Popen(
        [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    family = ProcessFamily((process.pid,))
    before = family.read_cpu()
    process.stdout.readline()
    after = family.read_cpu()
    assert sum(cpu_used(before, after).values()) > 0.1
    assert sum(idle_percent(before, after).values()) > 1
    assert sum(family.memory_mb().values()) >= 1
    process.communicate(b"\n")
    assert sum(cpu_used(after, family.read_cpu()).values()) >= 0
