"""Peers get pinned environments and our engine's arguments, stay on loopback, and end with all processes."""

import re
import sys
from pathlib import Path

import psutil
import pytest
from ray.serve._private import haproxy_templates

from loadtests.peers import litellm, process, ray_llm, vllm_router, vllm_server
from loadtests.peers.engine import engine_arguments, settings
from loadtests.peers.environment import isolated_variables
from loadtests.peers.loopback import on_loopback
from loadtests.peers.process import PeerFailed, free_port, running
from loadtests.peers.server import Server
from serve.engine.vllm.setup import engine_args

# Of the peers and of the drives.
LOCKS = sorted(Path(process.__file__).parents[1].glob("*/requirements-*.txt"))
ENTRY = re.compile(r"^(\S+)==(\S+) \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)
LITELLM_WHEEL = "bf8e3d23cddf0eb4c05714dffcaafd8a944adf0f9c9b01c6c863b2637309de2e"

# Answers any request, and leaves a process behind that has lost its parent.
SERVER = """
import http.server, subprocess, sys
child = "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL).pid)"
orphan = subprocess.run([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True).stdout
open(sys.argv[2], "w").write(orphan)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    text = next(lock for lock in LOCKS if lock.name == f"requirements-{name}.txt").read_text()
    return {
        package: (version, re.findall(r"sha256:([0-9a-f]{64})", hashes))
        for package, version, hashes in ENTRY.findall(text)
    }


def test_litellm_is_the_one_release_that_was_judged_and_only_its_wheel():
    packages = locked("litellm")
    assert packages["litellm"] == ("1.91.1", [LITELLM_WHEEL])
    assert packages["litellm-proxy-extras"][0] == "0.4.74"
    assert packages["litellm-enterprise"][0] == "0.1.44"


def test_the_router_is_the_release_that_is_compared():
    assert locked("vllm-router")["vllm-router"][0] == "0.1.17"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_holds_names_versions_and_hashes_and_nothing_else(lock: Path):
    text = lock.read_text()
    assert ENTRY.findall(text)
    assert ENTRY.sub("", text).strip() == ""


@pytest.mark.parametrize(
    "text",
    [
        vllm_server.LEAVES_OUT,
        litellm.LEAVES_OUT,
        vllm_router.LEAVES_OUT,
        ray_llm.LEAVES_OUT,
        ray_llm.LEAVES_OUT_DIRECT,
    ],
)
def test_each_peer_says_in_one_sentence_what_it_leaves_out(text: str):
    assert text.endswith(".")
    assert "metering" in text
    assert ". " not in text


def test_the_peers_engine_has_the_arguments_of_ours():
    ours = engine_args(settings(), ["q_proj", "v_proj"])
    del ours["worker_extension_cls"]  # fills our adapter slots
    assert engine_arguments(settings(), ["q_proj", "v_proj"]) == ours


def test_flags_are_what_vllm_reads():
    flags = vllm_server.flags(
        {"enable_lora": True, "enforce_eager": False, "max_loras": 4, "targets": ["q", "v"]}
    )
    assert flags == ["--enable-lora", "--max-loras", "4", "--targets", "q", "v"]


def test_litellm_has_a_route_for_the_base_and_for_each_adapter():
    upstream = Server("vllm", "http://127.0.0.1:1", "none", "tiny", 1, "", ("a", "b"))
    routes = litellm.configuration(upstream)["model_list"]
    assert [route["model_name"] for route in routes] == ["tiny", "a", "b"]
    assert {route["litellm_params"]["api_base"] for route in routes} == {"http://127.0.0.1:1/v1"}


def test_haproxy_of_the_installed_ray_binds_nothing_but_loopback():
    binds = re.findall(
        r"^ *bind (\S+?):", on_loopback(haproxy_templates.HAPROXY_CONFIG_TEMPLATE), re.MULTILINE
    )
    assert binds.count("127.0.0.1") == 2
    assert set(binds) <= {"127.0.0.1", "{{"}  # the others are the host that Serve is told


def test_another_haproxy_template_is_refused_not_passed_through():
    with pytest.raises(ValueError, match="stats_port"):
        on_loopback("frontend http_frontend\n    bind *:80\n")


def test_a_peer_knows_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("BESPOKE_DATABASE_URL", "postgresql://secret")
    assert "secret" not in str(isolated_variables(tmp_path))


def test_a_peer_that_ends_says_why(tmp_path: Path):
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(PeerFailed, match=r"odd: ended with status 1\n.*no such model"),
        started(command, tmp_path),
    ):
        pytest.fail("it never answered")


def test_leaving_ends_a_peer_and_even_a_descendant_that_has_lost_its_parent(tmp_path: Path):
    port = free_port()
    with started(serving(port, tmp_path), tmp_path, port) as pid:
        orphan = int((tmp_path / "orphan").read_text())
        assert runs(orphan)
    assert not runs(pid)
    assert not runs(orphan)


def test_a_peer_that_listens_beyond_loopback_is_refused_and_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(process, "LOOPBACK", ("::1",))  # so that no test has to listen elsewhere
    port = free_port()
    with (
        pytest.raises(PeerFailed, match=f"beyond loopback: .* on 127.0.0.1:{port}"),
        started(serving(port, tmp_path), tmp_path, port),
    ):
        pytest.fail("it was let through")
    assert not runs(int((tmp_path / "orphan").read_text()))


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def serving(port: int, scratch: Path) -> list[str]:
    return [sys.executable, "-c", SERVER, str(port), str(scratch / "orphan")]


def started(command: list[str], directory: Path, port: int = 1):
    variables = isolated_variables(directory)
    return running("odd", command, variables, directory=directory, url=f"http://127.0.0.1:{port}", model="m")
