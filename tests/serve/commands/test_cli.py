"""`bespoke …` as an operator types it, in a process of its own."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.cli import SUBCOMMANDS, app
from serve.commands.common import console
from serve.errors import RegistryError
from serve.registry.registry import AdapterRegistry
from serve.storage.database import Store
from serve.tenants import Tenants
from tests.support.constants import CONFIGS, NOON
from tests.support.lora_samples import publish_base, publish_sample

BESPOKE = [str(Path(sys.executable).with_name("bespoke"))]


def bespoke(home: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    env = os.environ | {"BESPOKE_HOME": str(home), "COLUMNS": "200", "NO_COLOR": "1"} | environment
    return subprocess.run([*BESPOKE, *arguments], capture_output=True, text=True, env=env, timeout=120)


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    code = """
        import sys
        from serve.cli import app
        try:
            app(["--help"])
        except SystemExit:
            pass
        heavy = {"torch", "vllm", "ray", "transformers", "sqlalchemy"} & set(sys.modules)
        sys.exit(f"loaded {heavy}" if heavy else 0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in SUBCOMMANDS)


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_every_command_has_help(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0, shown.output


def test_a_tenant_from_nothing_to_an_invoice(tmp_path: Path) -> None:
    for arguments in (
        ("price", "publish", str(CONFIGS / "prices" / "standard.yaml")),
        ("tenant", "create", "acme", "--credit-usd", "12.50"),
        ("price", "assign", "acme", "standard"),
        ("price", "list"),
        ("key", "list", "acme"),
        ("adapter", "list", "acme"),
        ("usage", "show", "acme"),
        ("tenant", "credit", "acme", "20"),
    ):
        done = bespoke(tmp_path, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    key = bespoke(tmp_path, "key", "create", "acme")
    (secret,) = re.findall(r"bsk-\S+", key.stdout)
    assert secret.encode() not in (tmp_path / "ledger.db").read_bytes()
    listed = bespoke(tmp_path, "key", "list", "acme").stdout
    assert secret not in listed
    assert f"…{secret[-4:]}" in listed
    assert "20.00" in bespoke(tmp_path, "tenant", "list").stdout
    invoice = bespoke(tmp_path, "invoice", "create", "acme", "--month", "2026-11")
    assert invoice.returncode == 0, invoice.stderr
    assert sorted(path.suffix for path in (tmp_path / "invoices" / "acme").iterdir()) == [".csv", ".pdf"]


def test_an_adapter_from_its_files_to_the_tenants_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESPOKE_HOME", str(tmp_path))
    monkeypatch.setattr(console, "width", 200)
    publish_base(tmp_path, "tiny")
    old, new = (publish_sample(tmp_path, "acme", "support", alpha=alpha).name for alpha in (1, 2))
    store = Store(f"sqlite:///{tmp_path / 'ledger.db'}")
    store.migrate()
    Tenants(store, b"secret").create("acme", at=NOON)
    registry = AdapterRegistry(store, ["tiny"])

    def say(verb: str, model: str = "acme") -> str:
        done = CliRunner().invoke(app, ["adapter", verb, model], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    old_model, new_model = f"acme/support@{old}", f"acme/support@{new}"
    assert say("register", old_model) == f"registered {old_model}: pending"
    registry.mark_ready(registry.find("acme", "support", old), NOON)
    assert say("register", old_model) == f"registered {old_model}: ready"
    assert say("promote", old_model) == f"acme/support now means {old_model}"
    say("pin", old_model)
    assert f"acme/support will mean, once an engine has probed it, {new_model}" in say("promote", new_model)
    listed = say("list")
    assert re.search(rf"{old_model} │ tiny │ 2 │ \S+ \S+ │ ready │ yes │ now", listed), listed
    assert re.search(rf"{new_model} │ tiny │ 2 │ \S+ \S+ │ pending │ │ next", listed), listed
    registry.reject(registry.find("acme", "support", new), "its logits are [the base's]", NOON)
    shown = say("show", new_model)
    assert "rejected" in shown
    assert "its logits are [the base's]" in shown
    with pytest.raises(RegistryError, match="'acme/support' points to"):
        say("retire", old_model)
    say("unpin", old_model)
    say("retire", new_model)
    assert "rejected, retired" in say("list")
    assert not registry.entry(registry.find("acme", "support", old)).pinned
    store.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("key", "create", "nobody"), "no tenant 'nobody'"),
        (("price", "assign", "nobody", "gold"), "no price plan 'gold'"),
        (("tenant", "create", "../x"), "../x"),
        (("adapter", "promote", "acme/support"), "acme/support"),
        (("adapter", "promote", "../../etc"), "invalid name '..'"),
        (("adapter", "register", "acme/support"), "No version of 'acme/support' is published"),
        (("adapter", "pin", "acme/support"), "say tenant/name@version"),
        (("adapter", "show", "acme/support@0"), "no registered version 'acme/support@0'"),
        (("invoice", "create", "acme", "--month", "soon"), "soon"),
        (("usage", "check", "--url", "http://127.0.0.1:9"), "127.0.0.1:9"),
        (("serve", "--base", "missing"), "bespoke base import"),
        (("serve", "--host", "not a host"), "host"),
    ],
)
def test_what_is_wrong_is_one_clear_line_and_exit_status_1(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = bespoke(tmp_path, *arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_setting_with_a_typing_mistake_is_refused_by_name(tmp_path: Path) -> None:
    profile = tmp_path / "serve.yaml"
    profile.write_text("portt: 1\nengine: {max_lora: 2}\n")
    done = bespoke(tmp_path, "serve", "--config", str(profile))
    assert done.returncode == 1
    assert "portt" in done.stderr
    assert "engine.max_lora" in done.stderr


def test_the_profiles_that_we_ship_are_valid() -> None:
    from serve.settings import load_settings

    for profile in sorted((CONFIGS / "serve").glob("*.yaml")):
        assert load_settings(profile).host == "127.0.0.1"


@pytest.mark.parametrize(
    ("cores", "bases", "replicas", "threads"),
    [(1, 1, 1, 1), (2, 1, 1, 1), (8, 1, 1, 7), (8, 1, 2, 3), (8, 3, 2, 1)],
)
def test_engines_share_all_cores_but_one(
    monkeypatch: pytest.MonkeyPatch, cores: int, bases: int, replicas: int, threads: int
) -> None:
    from serve.settings import load_settings

    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(cores)))
    shared = {"bases": [f"base-{number}" for number in range(bases)], "engine_replicas": replicas}
    assert load_settings(None, **shared).engine_here.compute_threads == threads
    assert load_settings(None, **shared, engine={"compute_threads": 5}).engine_here.compute_threads == 5


def test_the_environment_overrides_the_profile_and_the_command_line_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.settings import load_settings

    profile = tmp_path / "serve.yaml"
    profile.write_text("port: 1001\nengine: {max_loras: 3}\n")
    assert load_settings(profile).port == 1001
    monkeypatch.setenv("BESPOKE_PORT", "1002")
    monkeypatch.setenv("BESPOKE_ENGINE__MAX_NUM_SEQS", "7")
    settings = load_settings(profile)
    assert (settings.port, settings.engine.max_loras, settings.engine.max_num_seqs) == (1002, 3, 7)
    assert load_settings(profile, port=1003).port == 1003
    assert json.loads(settings.model_dump_json())["host"] == "127.0.0.1"
