"""Checks invariants 1, 5 and 9: versions are immutable, a tenant's own, and pass their gate and probe."""

import shutil
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from serve.errors import ModelNotFound, RegistryError, UnknownRecord
from serve.registry.registry import AdapterRegistry, newest_published
from serve.registry.validation import decoder_linears, target_suffixes
from serve.registry.versions import AdapterVersion, DesiredVersion, VersionInfo, VersionState
from serve.storage.database import Store
from serve.tenants import Tenants
from tests.support.constants import NOON, TENANTS, TINY
from tests.support.lora_samples import RANK, publish_base, publish_sample

LUMEN, TIDEWATER = TENANTS
SUPPORT = f"{LUMEN}/support"
LATER = NOON + timedelta(days=1)
Enter = Callable[..., AdapterVersion]
NOBODY = AdapterVersion(99, LUMEN, "support", "0" * 16)


@pytest.fixture
def registry(store: Store) -> AdapterRegistry:
    tenants = Tenants(store, b"secret")
    for tenant in TENANTS:
        tenants.create(tenant, at=NOON)
    return AdapterRegistry(store, [TINY])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return publish_base(tmp_path, TINY)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return publish_sample(tmp_path, LUMEN, "support")


@pytest.fixture
def enter(registry: AdapterRegistry, base: Path, tmp_path: Path) -> Enter:
    """Publishes and registers version `number` of an adapter, and lets it pass its probe."""

    def enter(
        number: int = 1, tenant: str = LUMEN, *, ready: bool = True, at: datetime = NOON
    ) -> AdapterVersion:
        directory = publish_sample(tmp_path, tenant, "support", alpha=number)
        adapter = registry.register(directory, at=at, base_dir=base, max_rank=RANK)
        if ready:
            assert registry.mark_ready(adapter, at)
        return adapter

    return enter


def resolve(registry: AdapterRegistry, store: Store, tenant: str, name: str) -> AdapterVersion | None:
    with store.read() as connection:
        return registry.resolve(connection, tenant, name).adapter


def names(registry: AdapterRegistry, tenant: str = LUMEN) -> list[str]:
    return [model.name for model in registry.models(tenant)]


# Names


def test_an_alias_means_its_promoted_version(registry: AdapterRegistry, store: Store, enter: Enter) -> None:
    adapter = enter()
    with pytest.raises(ModelNotFound):
        resolve(registry, store, LUMEN, SUPPORT)
    registry.promote(adapter, at=NOON)
    assert resolve(registry, store, LUMEN, SUPPORT) == adapter
    assert resolve(registry, store, LUMEN, adapter.model) == adapter
    assert resolve(registry, store, LUMEN, TINY) is None
    assert names(registry) == [TINY, SUPPORT, adapter.model]


def test_promoting_an_older_version_again_goes_back_to_it(
    registry: AdapterRegistry, store: Store, enter: Enter
) -> None:
    old, new = enter(1), enter(2)
    for adapter in (old, new, old):
        registry.promote(adapter, at=NOON)
        assert resolve(registry, store, LUMEN, SUPPORT) == adapter


def test_a_name_of_another_tenant_does_not_exist(
    registry: AdapterRegistry, store: Store, enter: Enter
) -> None:
    adapter = enter()
    registry.promote(adapter, at=NOON)
    for name in (SUPPORT, adapter.model):
        with pytest.raises(ModelNotFound):
            resolve(registry, store, TIDEWATER, name)
    assert names(registry, TIDEWATER) == [TINY]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "@",
        f"{LUMEN}/",
        f"{LUMEN}/support@",
        f"{LUMEN}/support@../../x",
        f"{LUMEN}/../{TIDEWATER}/support",
        f"{LUMEN}/support@{'0' * 16}",
        "TINY",
        f"{TINY}@1",
        "a" * 200,
    ],
)
def test_a_malformed_or_unknown_name_does_not_exist(
    registry: AdapterRegistry, store: Store, enter: Enter, name: str
) -> None:
    registry.promote(enter(), at=NOON)
    with pytest.raises(ModelNotFound):
        resolve(registry, store, LUMEN, name)


def test_an_adapter_of_a_base_that_is_not_served_does_not_exist(
    registry: AdapterRegistry, store: Store, enter: Enter
) -> None:
    registry.promote(enter(), at=NOON)
    other = AdapterRegistry(store, ["other"])
    with pytest.raises(ModelNotFound):
        resolve(other, store, LUMEN, SUPPORT)
    assert names(other) == ["other"]


# Registering


def test_registering_again_is_the_same_adapter_as_it_is(
    registry: AdapterRegistry, base: Path, published: Path
) -> None:
    adapter = registry.register(published, at=NOON, base_dir=base, max_rank=RANK)
    registry.mark_ready(adapter, NOON)
    registry.pin(adapter, True)
    info = registry.entry(adapter)
    assert registry.register(published, at=LATER, base_dir=base, max_rank=RANK) == adapter
    assert registry.entry(adapter) == info
    assert registry.find(LUMEN, "support", published.name) == adapter


def test_a_version_is_entered_as_pending_with_what_its_files_hold(
    registry: AdapterRegistry, base: Path, published: Path
) -> None:
    adapter = registry.register(published, at=NOON, base_dir=base, max_rank=RANK)
    assert registry.entries() == registry.entries(LUMEN) == [registry.entry(adapter)]
    assert registry.entry(adapter) == VersionInfo(
        ref=adapter,
        base=TINY,
        state=VersionState.PENDING,
        reason=None,
        pinned=False,
        alias=None,
        rank=RANK,
        bytes=(published / "adapter_model.safetensors").stat().st_size,
        registered_at=NOON,
        probed_at=None,
        retired_at=None,
    )


def refused(registry: AdapterRegistry, directory: Path, base: Path, max_rank: int = RANK) -> str:
    with pytest.raises(RegistryError) as caught:
        registry.register(directory, at=NOON, base_dir=base, max_rank=max_rank)
    assert registry.entries() == []
    assert registry.revision() == 0
    return str(caught.value)


def test_a_flipped_bit_in_the_weights_keeps_an_adapter_out(
    registry: AdapterRegistry, base: Path, published: Path
) -> None:
    weights = published / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert refused(registry, published, base)


def test_an_adapter_whose_gate_did_not_pass_is_kept_out(
    registry: AdapterRegistry, base: Path, tmp_path: Path
) -> None:
    failed: dict[str, Any] = {"gate": {"rule": "better", "passed": False, "reason": "worse than the base"}}
    directory = publish_sample(tmp_path, LUMEN, "support", **failed)
    assert "its gate did not pass: worse than the base" in refused(registry, directory, base)


def test_a_pickle_beside_the_weights_keeps_an_adapter_out(
    registry: AdapterRegistry, base: Path, published: Path
) -> None:
    (published / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert refused(registry, published, base)


def test_an_adapter_in_another_tenants_folder_is_kept_out(
    registry: AdapterRegistry, base: Path, published: Path
) -> None:
    stolen = published.parents[2] / TIDEWATER / "support" / published.name
    shutil.copytree(published, stolen)
    assert "its place contradicts its card" in refused(registry, stolen, base)


def test_an_adapter_of_another_base_is_kept_out(
    registry: AdapterRegistry, published: Path, tmp_path: Path
) -> None:
    other = publish_base(tmp_path, "other")
    assert "its base is 'tiny', not 'other'" in refused(registry, published, other)


def test_an_adapter_whose_files_do_not_fit_its_base_is_kept_out(
    registry: AdapterRegistry, base: Path, published: Path
) -> None:
    assert "r is 2, expected an integer from 1 to 1" in refused(registry, published, base, RANK - 1)


def test_an_adapter_of_an_unknown_tenant_is_kept_out(store: Store, base: Path, published: Path) -> None:
    with pytest.raises(UnknownRecord, match="no tenant"):
        AdapterRegistry(store, [TINY]).register(published, at=NOON, base_dir=base, max_rank=RANK)


def test_the_newest_published_version_is_the_one_whose_card_is_newest(tmp_path: Path) -> None:
    newest = publish_sample(tmp_path, LUMEN, "support", alpha=1, created_at=datetime(2026, 3, 1, tzinfo=UTC))
    publish_sample(tmp_path, LUMEN, "support", alpha=2)
    assert newest_published(tmp_path / "adapters", LUMEN, "support") == newest
    with pytest.raises(UnknownRecord):
        newest_published(tmp_path / "adapters", LUMEN, "nothing")


# States


def test_a_version_that_no_engine_has_probed_does_not_exist_for_its_tenant(
    registry: AdapterRegistry, store: Store, enter: Enter
) -> None:
    adapter = enter(ready=False)
    registry.promote(adapter, at=NOON)
    for name in (SUPPORT, adapter.model):
        with pytest.raises(ModelNotFound):
            resolve(registry, store, LUMEN, name)
    assert names(registry) == [TINY]
    registry.mark_ready(adapter, NOON)
    assert names(registry) == [TINY, SUPPORT, adapter.model]


def test_an_alias_means_its_last_ready_version_until_the_next_has_passed_its_probe(
    registry: AdapterRegistry, store: Store, enter: Enter
) -> None:
    old, new = enter(1), enter(2, ready=False)
    for adapter in (old, new):
        registry.promote(adapter, at=NOON)
    assert resolve(registry, store, LUMEN, SUPPORT) == old
    assert [entry.alias for entry in registry.entries()] == ["now", "next"]
    assert registry.mark_ready(new, NOON)
    assert resolve(registry, store, LUMEN, SUPPORT) == new
    assert [entry.alias for entry in registry.entries()] == [None, "now"]


def test_a_rejected_version_never_shows_and_its_alias_means_the_one_before(
    registry: AdapterRegistry, store: Store, enter: Enter
) -> None:
    old, new = enter(1), enter(2, ready=False)
    for adapter in (old, new):
        registry.promote(adapter, at=NOON)
    assert registry.reject(new, "the logits are the base's", LATER)
    assert not registry.mark_ready(new, LATER)
    assert resolve(registry, store, LUMEN, SUPPORT) == old
    assert names(registry) == [TINY, SUPPORT, old.model]
    entry = registry.entry(new)
    assert (entry.state, entry.reason, entry.probed_at) == (
        VersionState.REJECTED,
        "the logits are the base's",
        LATER,
    )
    assert entry.alias is None
    with pytest.raises(RegistryError, match="was rejected: the logits are the base's"):
        registry.promote(new, at=LATER)


def test_the_first_verdict_stands(registry: AdapterRegistry, enter: Enter) -> None:
    adapter = enter()
    assert not registry.mark_ready(adapter, LATER)
    assert not registry.reject(adapter, "too late", LATER)
    assert (registry.state(adapter), registry.entry(adapter).probed_at) == (VersionState.READY, NOON)
    assert registry.entry(adapter).reason is None


def test_a_reason_is_bounded(registry: AdapterRegistry, enter: Enter) -> None:
    adapter = enter(ready=False)
    registry.reject(adapter, "x" * 5000, NOON)
    assert registry.entry(adapter).reason == "x" * 1000


def test_of_two_verdicts_at_once_exactly_one_stands(
    registry: AdapterRegistry, store: Store, enter: Enter
) -> None:
    adapter = enter(ready=False)
    before = registry.revision()
    start = threading.Barrier(8)
    won: list[VersionState] = []

    def decide(state: VersionState) -> None:
        own = AdapterRegistry(store, [TINY])
        start.wait()
        ready = state == VersionState.READY
        if own.mark_ready(adapter, NOON) if ready else own.reject(adapter, "no effect", NOON):
            won.append(state)

    threads = [
        threading.Thread(target=decide, args=(state,))
        for state in [VersionState.READY, VersionState.REJECTED] * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [registry.state(adapter)]
    assert registry.revision() == before + 1


# The base's linear layers


def test_the_linear_layers_of_decoder_layers_are_what_an_adapter_may_target(base: Path) -> None:
    shapes = decoder_linears(base)
    assert sorted(shapes) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert shapes["model.layers.1.mlp.up_proj"] == (10, 6)
    assert target_suffixes(base) == ["q_proj", "up_proj"]


def test_a_base_without_decoder_layers_has_nothing_to_target(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="decoder layers"):
        target_suffixes(tmp_path)


# What engines should have


def test_engines_should_have_all_but_the_rejected_and_the_retired(
    registry: AdapterRegistry, enter: Enter
) -> None:
    ready, pending, rejected, retired = enter(1), enter(2, ready=False), enter(3, ready=False), enter(4)
    other = enter(1, TIDEWATER)
    registry.reject(rejected, "no effect", NOON)
    registry.retire(retired, NOON)
    registry.pin(other, True)
    assert registry.desired(TINY) == [
        DesiredVersion(ready, VersionState.READY, False),
        DesiredVersion(pending, VersionState.PENDING, False),
        DesiredVersion(other, VersionState.READY, True),
    ]
    assert registry.desired("other") == []


def test_the_revision_grows_with_every_change_and_only_then(
    registry: AdapterRegistry, base: Path, published: Path, enter: Enter
) -> None:
    first, second = enter(1, ready=False), enter(2, ready=False)
    steps: list[tuple[bool, Callable[[], object]]] = [
        (True, lambda: registry.register(published, at=NOON, base_dir=base, max_rank=RANK)),
        (False, lambda: registry.register(published, at=NOON, base_dir=base, max_rank=RANK)),
        (True, lambda: registry.promote(first, at=NOON)),
        (True, lambda: registry.mark_ready(first, NOON)),
        (False, lambda: registry.mark_ready(first, NOON)),
        (False, lambda: registry.reject(first, "late", NOON)),
        (True, lambda: registry.pin(first, True)),
        (False, lambda: registry.pin(first, True)),
        (True, lambda: registry.pin(first, False)),
        (True, lambda: registry.retire(second, NOON)),
        (False, lambda: registry.retire(second, LATER)),
        (True, lambda: registry.reject(second, "no effect", NOON)),
    ]
    for number, (changes, step) in enumerate(steps):
        before = registry.revision()
        step()
        assert (registry.revision() > before) == changes, number


def test_changes_of_the_catalogue_at_once_are_all_counted(
    registry: AdapterRegistry, store: Store, enter: Enter
) -> None:
    adapter = enter()
    before = registry.revision()

    def promote() -> None:
        for _ in range(5):
            AdapterRegistry(store, [TINY]).promote(adapter, at=NOON)

    threads = [threading.Thread(target=promote) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.revision() == before + 20


# Pinning and retiring


def test_a_rejected_or_retired_version_cannot_be_pinned_but_unpinned(
    registry: AdapterRegistry, enter: Enter
) -> None:
    rejected, retired = enter(1, ready=False), enter(2)
    for adapter in (rejected, retired):
        registry.pin(adapter, True)
    registry.reject(rejected, "no effect", NOON)
    registry.retire(retired, NOON)
    for adapter in (rejected, retired):
        with pytest.raises(RegistryError):
            registry.pin(adapter, True)
        registry.pin(adapter, False)
        assert not registry.entry(adapter).pinned


def test_a_retired_version_does_not_exist_for_its_tenant_and_stays_retired(
    registry: AdapterRegistry, store: Store, base: Path, enter: Enter, tmp_path: Path
) -> None:
    adapter = enter()
    registry.retire(adapter, NOON)
    registry.retire(adapter, LATER)
    with pytest.raises(ModelNotFound):
        resolve(registry, store, LUMEN, adapter.model)
    assert names(registry) == [TINY]
    with pytest.raises(RegistryError, match="retired"):
        registry.promote(adapter, at=LATER)
    again = adapter.path(tmp_path / "adapters")
    registry.register(again, at=LATER, base_dir=base, max_rank=RANK)
    assert registry.entry(adapter).retired_at == NOON


def test_a_version_that_an_alias_means_or_will_mean_is_not_retired(
    registry: AdapterRegistry, enter: Enter
) -> None:
    old, new = enter(1), enter(2, ready=False)
    for adapter in (old, new):
        registry.promote(adapter, at=NOON)
    for adapter in (old, new):
        with pytest.raises(RegistryError, match=f"The alias '{SUPPORT}' points to"):
            registry.retire(adapter, NOON)
    registry.mark_ready(new, NOON)
    registry.retire(old, NOON)
    assert names(registry) == [TINY, SUPPORT, new.model]


def test_a_promoted_version_that_was_rejected_may_be_retired(registry: AdapterRegistry, enter: Enter) -> None:
    adapter = enter(ready=False)
    registry.promote(adapter, at=NOON)
    registry.reject(adapter, "no effect", NOON)
    registry.retire(adapter, LATER)
    assert registry.entry(adapter).retired_at == LATER


@pytest.mark.parametrize(
    "ask",
    [
        lambda registry: registry.find(NOBODY.tenant, NOBODY.name, NOBODY.version),
        lambda registry: registry.state(NOBODY),
        lambda registry: registry.entry(NOBODY),
        lambda registry: registry.promote(NOBODY, at=NOON),
        lambda registry: registry.pin(NOBODY, True),
        lambda registry: registry.retire(NOBODY, NOON),
    ],
)
def test_an_unknown_version_is_unknown(
    registry: AdapterRegistry, ask: Callable[[AdapterRegistry], object]
) -> None:
    with pytest.raises(UnknownRecord, match="no registered version"):
        ask(registry)
    assert not registry.mark_ready(NOBODY, NOON)
    assert registry.revision() == 0
