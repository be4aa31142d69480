"""`bespoke …` as an operator types it, in a process of its own."""

import json
import os
import re
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.cli import SUBCOMMANDS, app
from serve.commands import usage
from serve.errors import OperatorError, ReconciliationFailed, RegistryError
from serve.registry.registry import AdapterRegistry
from serve.storage.database import Store
from serve.tenants import Tenants
from tests.support.constants import CONFIGS, NOON
from tests.support.lora_samples import publish_base, publish_sample

BESPOKE = [str(Path(sys.executable).with_name("bespoke"))]


def bespoke(home: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    env = os.environ | {"BESPOKE_HOME": str(home), "COLUMNS": "80", "NO_COLOR": "1"} | environment
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
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in SUBCOMMANDS)


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_every_command_has_help(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0, shown.output


def test_a_tenant_from_nothing_to_an_invoice(tmp_path: Path) -> None:
    for arguments in (
        ("price", "publish", str(CONFIGS / "prices" / "standard.yaml")),
        ("tenant", "create", "acme", "--credit", "12.50"),
        ("price", "assign", "acme", "standard"),
        ("price", "list"),
        ("key", "list", "acme"),
        ("adapter", "list", "acme"),
        ("usage", "show", "acme"),
        ("tenant", "credit", "acme", "20"),
    ):
        result = bespoke(tmp_path, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
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
    publish_base(tmp_path, "tiny")
    old, new = (publish_sample(tmp_path, "acme", "support", alpha=alpha).name for alpha in (1, 2))
    store = Store(f"sqlite:///{tmp_path / 'ledger.db'}")
    store.migrate()
    Tenants(store, b"secret").create("acme", at=NOON)
    registry = AdapterRegistry(store, ["tiny"])

    def bespoke_adapter(verb: str, model: str = "acme") -> str:
        result = CliRunner().invoke(app, ["adapter", verb, model], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    old_model, new_model = f"acme/support@{old}", f"acme/support@{new}"
    assert bespoke_adapter("register", old_model) == f"registered {old_model}: pending"
    registry.mark_ready(registry.find("acme", "support", old), NOON)
    assert bespoke_adapter("register", old_model) == f"registered {old_model}: ready"
    assert bespoke_adapter("promote", old_model) == f"acme/support now means {old_model}"
    bespoke_adapter("pin", old_model)
    assert f"acme/support will mean, once an engine has probed it, {new_model}" in bespoke_adapter(
        "promote", new_model
    )
    listed = bespoke_adapter("list")
    assert re.search(rf"{old_model} tiny 2 \S+ \S+ ready yes now", listed), listed
    assert re.search(rf"{new_model} tiny 2 \S+ \S+ pending next", listed), listed
    for verb in ("pin", "retire"):
        with pytest.raises(OperatorError, match=f"means {old_model} now and {new_model} once it is probed"):
            bespoke_adapter(verb, "acme/support")
    shown = bespoke_adapter("show", "acme/support")
    assert shown.startswith(f"model {old_model} ")
    assert f"alias next {new_model}" in shown
    registry.reject(registry.find("acme", "support", new), "its logits are [the base's]", NOON)
    assert f"acme/support is {old_model}" in bespoke_adapter("unpin", "acme/support")
    assert f"every replica keeps {old_model} loaded" in bespoke_adapter("pin", "acme/support")
    shown = bespoke_adapter("show", new_model)
    assert "rejected" in shown
    assert "its logits are [the base's]" in shown
    with pytest.raises(RegistryError, match="'acme/support' points to"):
        bespoke_adapter("retire", "acme/support")
    bespoke_adapter("unpin", old_model)
    bespoke_adapter("retire", new_model)
    assert "rejected, retired" in bespoke_adapter("list")
    assert not registry.entry(registry.find("acme", "support", old)).pinned
    store.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("key", "create", "nobody"), "no tenant 'nobody'"),
        (("price", "assign", "nobody", "gold"), "no price plan 'gold'"),
        (("price", "end", "nobody"), "no plan that 'nobody' pays"),
        (("tenant", "create", "../x"), "../x"),
        (("adapter", "promote", "acme/support"), "acme/support"),
        (("adapter", "promote", "../../etc"), "invalid name '..'"),
        (("adapter", "register", "acme/support"), "No version of 'acme/support' is published"),
        (("adapter", "pin", "acme/support"), "No version of 'acme/support' is registered"),
        (("key", "list", "nobody", "--json"), "no tenant 'nobody'"),
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
    process = bespoke(tmp_path, *arguments)
    assert process.returncode == 1
    assert words in process.stderr
    assert process.stdout == ""
    assert len(process.stderr.strip().splitlines()) == 1


def test_an_alias_that_means_no_version_names_those_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESPOKE_HOME", str(tmp_path))
    publish_base(tmp_path, "tiny")
    with closing(Store(f"sqlite:///{tmp_path / 'ledger.db'}")) as store:
        store.migrate()
        Tenants(store, b"secret").create("acme", at=NOON)
        base_dir, registry = tmp_path / "bases" / "tiny", AdapterRegistry(store, ["tiny"])
        models = [
            registry.register(
                publish_sample(tmp_path, "acme", "support", alpha=alpha),
                at=NOON,
                base_dir=base_dir,
                max_rank=16,
            ).model
            for alpha in (1, 2)
        ]
    result = CliRunner().invoke(app, ["adapter", "show", "acme/support"])
    assert isinstance(result.exception, OperatorError)
    assert all(model in str(result.exception) for model in models)


@pytest.mark.parametrize(
    ("profile", "environment", "url"),
    [
        ("", {}, "http://127.0.0.1:8000"),
        ("port: 8123", {}, "http://127.0.0.1:8123"),
        ("port: 8123", {"BESPOKE_PORT": "8124"}, "http://127.0.0.1:8124"),
        ("host: 0.0.0.0", {}, "http://127.0.0.1:8000"),
        ("host: '::'", {}, "http://[::1]:8000"),
    ],
)
def test_usage_check_asks_the_gateway_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, environment: dict[str, str], url: str
) -> None:
    urls: list[str] = []
    monkeypatch.setattr(usage, "engine_counts", lambda url, token: urls.append(url) or [])
    monkeypatch.setenv("BESPOKE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = tmp_path / "serve.yaml"
    config.write_text(profile or "{}")
    result = CliRunner().invoke(app, ["usage", "check", "--config", str(config)])
    assert isinstance(result.exception, ReconciliationFailed)  # no engine counted anything
    assert urls == [url]


def test_a_port_that_the_system_chooses_wants_a_url(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["usage", "check", "--home", str(tmp_path)], env={"BESPOKE_PORT": "0"})
    assert isinstance(result.exception, OperatorError)
    assert "--url" in str(result.exception)


def test_a_setting_with_a_typing_mistake_is_refused_by_name(tmp_path: Path) -> None:
    profile = tmp_path / "serve.yaml"
    profile.write_text("portt: 1\nengine: {max_lora: 2}\n")
    result = bespoke(tmp_path, "serve", "--config", str(profile))
    assert result.returncode == 1
    assert "portt" in result.stderr
    assert "engine.max_lora" in result.stderr


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
