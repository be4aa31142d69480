"""Invariants 1, 5 and 9: immutable versions, nobody else's, nothing without its gate and its probe."""

import shutil
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from serve.errors import CatalogueError, ModelNotFound, UnknownRecord
from serve.registry.registry import Catalogue, newest_published
from serve.registry.validation import decoder_linears, target_suffixes
from serve.registry.versions import AdapterRef, Desired, Entry, State
from serve.storage.database import Store
from serve.tenants import Tenants
from tests.serve.conftest import NOON, TENANTS, TINY
from tests.support.lora_samples import RANK, publish_base, publish_sample

LUMEN, TIDEWATER = TENANTS
SUPPORT = f"{LUMEN}/support"
LATER = NOON + timedelta(days=1)
Enter = Callable[..., AdapterRef]
NOBODY = AdapterRef(99, LUMEN, "support", "0" * 16)


@pytest.fixture
def catalogue(store: Store) -> Catalogue:
    tenants = Tenants(store, b"secret")
    for tenant in TENANTS:
        tenants.create(tenant, at=NOON)
    return Catalogue(store, [TINY])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return publish_base(tmp_path, TINY)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return publish_sample(tmp_path, LUMEN, "support")


@pytest.fixture
def enter(catalogue: Catalogue, base: Path, tmp_path: Path) -> Enter:
    """Publish and register the version `number` of an adapter, and let it pass its probe."""

    def enter(number: int = 1, tenant: str = LUMEN, *, ready: bool = True, at: datetime = NOON) -> AdapterRef:
        directory = publish_sample(tmp_path, tenant, "support", alpha=number)
        adapter = catalogue.register(directory, at=at, base_dir=base, max_rank=RANK)
        if ready:
            assert catalogue.mark_ready(adapter, at)
        return adapter

    return enter


def resolve(catalogue: Catalogue, store: Store, tenant: str, name: str) -> AdapterRef | None:
    with store.read() as connection:
        return catalogue.resolve(connection, tenant, name).adapter


def names(catalogue: Catalogue, tenant: str = LUMEN) -> list[str]:
    return [model.name for model in catalogue.models(tenant)]


# Names


def test_an_alias_means_its_promoted_version(catalogue: Catalogue, store: Store, enter: Enter) -> None:
    adapter = enter()
    with pytest.raises(ModelNotFound):
        resolve(catalogue, store, LUMEN, SUPPORT)
    catalogue.promote(adapter, at=NOON)
    assert resolve(catalogue, store, LUMEN, SUPPORT) == adapter
    assert resolve(catalogue, store, LUMEN, adapter.model) == adapter
    assert resolve(catalogue, store, LUMEN, TINY) is None
    assert names(catalogue) == [TINY, SUPPORT, adapter.model]


def test_promoting_an_older_version_again_goes_back_to_it(
    catalogue: Catalogue, store: Store, enter: Enter
) -> None:
    old, new = enter(1), enter(2)
    for adapter in (old, new, old):
        catalogue.promote(adapter, at=NOON)
        assert resolve(catalogue, store, LUMEN, SUPPORT) == adapter


def test_a_name_of_another_tenant_does_not_exist(catalogue: Catalogue, store: Store, enter: Enter) -> None:
    adapter = enter()
    catalogue.promote(adapter, at=NOON)
    for name in (SUPPORT, adapter.model):
        with pytest.raises(ModelNotFound):
            resolve(catalogue, store, TIDEWATER, name)
    assert names(catalogue, TIDEWATER) == [TINY]


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
    catalogue: Catalogue, store: Store, enter: Enter, name: str
) -> None:
    catalogue.promote(enter(), at=NOON)
    with pytest.raises(ModelNotFound):
        resolve(catalogue, store, LUMEN, name)


def test_an_adapter_of_a_base_that_is_not_served_does_not_exist(
    catalogue: Catalogue, store: Store, enter: Enter
) -> None:
    catalogue.promote(enter(), at=NOON)
    other = Catalogue(store, ["other"])
    with pytest.raises(ModelNotFound):
        resolve(other, store, LUMEN, SUPPORT)
    assert names(other) == ["other"]


# Registering


def test_registering_again_is_the_same_adapter_as_it_is(
    catalogue: Catalogue, base: Path, published: Path
) -> None:
    adapter = catalogue.register(published, at=NOON, base_dir=base, max_rank=RANK)
    catalogue.mark_ready(adapter, NOON)
    catalogue.pin(adapter, True)
    known = catalogue.entry(adapter)
    assert catalogue.register(published, at=LATER, base_dir=base, max_rank=RANK) == adapter
    assert catalogue.entry(adapter) == known
    assert catalogue.find(LUMEN, "support", published.name) == adapter


def test_a_version_is_entered_as_pending_with_what_its_files_hold(
    catalogue: Catalogue, base: Path, published: Path
) -> None:
    adapter = catalogue.register(published, at=NOON, base_dir=base, max_rank=RANK)
    assert catalogue.entries() == catalogue.entries(LUMEN) == [catalogue.entry(adapter)]
    assert catalogue.entry(adapter) == Entry(
        ref=adapter,
        base=TINY,
        state=State.PENDING,
        reason=None,
        pinned=False,
        alias=None,
        rank=RANK,
        bytes=(published / "adapter_model.safetensors").stat().st_size,
        registered_at=NOON,
        probed_at=None,
        retired_at=None,
    )


def refused(catalogue: Catalogue, directory: Path, base: Path, max_rank: int = RANK) -> str:
    with pytest.raises(CatalogueError) as caught:
        catalogue.register(directory, at=NOON, base_dir=base, max_rank=max_rank)
    assert catalogue.entries() == []
    assert catalogue.revision() == 0
    return str(caught.value)


def test_a_flipped_bit_in_the_weights_keeps_an_adapter_out(
    catalogue: Catalogue, base: Path, published: Path
) -> None:
    weights = published / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert refused(catalogue, published, base)


def test_an_adapter_whose_gate_did_not_pass_is_kept_out(
    catalogue: Catalogue, base: Path, tmp_path: Path
) -> None:
    failed: dict[str, Any] = {"gate": {"rule": "better", "passed": False, "reason": "worse than the base"}}
    directory = publish_sample(tmp_path, LUMEN, "support", **failed)
    assert "its gate did not pass: worse than the base" in refused(catalogue, directory, base)


def test_a_pickle_beside_the_weights_keeps_an_adapter_out(
    catalogue: Catalogue, base: Path, published: Path
) -> None:
    (published / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert refused(catalogue, published, base)


def test_an_adapter_in_another_tenants_folder_is_kept_out(
    catalogue: Catalogue, base: Path, published: Path
) -> None:
    stolen = published.parents[2] / TIDEWATER / "support" / published.name
    shutil.copytree(published, stolen)
    assert "its place contradicts its card" in refused(catalogue, stolen, base)


def test_an_adapter_of_another_base_is_kept_out(
    catalogue: Catalogue, published: Path, tmp_path: Path
) -> None:
    other = publish_base(tmp_path, "other")
    assert "its base is 'tiny', not 'other'" in refused(catalogue, published, other)


def test_an_adapter_whose_files_do_not_fit_its_base_is_kept_out(
    catalogue: Catalogue, base: Path, published: Path
) -> None:
    assert "r is 2, expected an integer from 1 to 1" in refused(catalogue, published, base, RANK - 1)


def test_an_adapter_of_an_unknown_tenant_is_kept_out(store: Store, base: Path, published: Path) -> None:
    with pytest.raises(UnknownRecord, match="no tenant"):
        Catalogue(store, [TINY]).register(published, at=NOON, base_dir=base, max_rank=RANK)


def test_the_newest_published_version_is_the_one_whose_card_is_newest(tmp_path: Path) -> None:
    newest = publish_sample(tmp_path, LUMEN, "support", alpha=1, created_at=datetime(2026, 3, 1, tzinfo=UTC))
    publish_sample(tmp_path, LUMEN, "support", alpha=2)
    assert newest_published(tmp_path / "adapters", LUMEN, "support") == newest
    with pytest.raises(UnknownRecord):
        newest_published(tmp_path / "adapters", LUMEN, "nothing")


# States


def test_a_version_that_no_engine_has_probed_does_not_exist_for_its_tenant(
    catalogue: Catalogue, store: Store, enter: Enter
) -> None:
    adapter = enter(ready=False)
    catalogue.promote(adapter, at=NOON)
    for name in (SUPPORT, adapter.model):
        with pytest.raises(ModelNotFound):
            resolve(catalogue, store, LUMEN, name)
    assert names(catalogue) == [TINY]
    catalogue.mark_ready(adapter, NOON)
    assert names(catalogue) == [TINY, SUPPORT, adapter.model]


def test_an_alias_means_its_last_ready_version_until_the_next_has_passed_its_probe(
    catalogue: Catalogue, store: Store, enter: Enter
) -> None:
    old, new = enter(1), enter(2, ready=False)
    for adapter in (old, new):
        catalogue.promote(adapter, at=NOON)
    assert resolve(catalogue, store, LUMEN, SUPPORT) == old
    assert [entry.alias for entry in catalogue.entries()] == ["now", "next"]
    assert catalogue.mark_ready(new, NOON)
    assert resolve(catalogue, store, LUMEN, SUPPORT) == new
    assert [entry.alias for entry in catalogue.entries()] == [None, "now"]


def test_a_rejected_version_never_shows_and_its_alias_means_the_one_before(
    catalogue: Catalogue, store: Store, enter: Enter
) -> None:
    old, new = enter(1), enter(2, ready=False)
    for adapter in (old, new):
        catalogue.promote(adapter, at=NOON)
    assert catalogue.reject(new, "the logits are the base's", LATER)
    assert not catalogue.mark_ready(new, LATER)
    assert resolve(catalogue, store, LUMEN, SUPPORT) == old
    assert names(catalogue) == [TINY, SUPPORT, old.model]
    entry = catalogue.entry(new)
    assert (entry.state, entry.reason, entry.probed_at) == (
        State.REJECTED,
        "the logits are the base's",
        LATER,
    )
    assert entry.alias is None
    with pytest.raises(CatalogueError, match="was rejected: the logits are the base's"):
        catalogue.promote(new, at=LATER)


def test_the_first_verdict_stands(catalogue: Catalogue, enter: Enter) -> None:
    adapter = enter()
    assert not catalogue.mark_ready(adapter, LATER)
    assert not catalogue.reject(adapter, "too late", LATER)
    assert (catalogue.state(adapter), catalogue.entry(adapter).probed_at) == (State.READY, NOON)
    assert catalogue.entry(adapter).reason is None


def test_a_reason_is_bounded(catalogue: Catalogue, enter: Enter) -> None:
    adapter = enter(ready=False)
    catalogue.reject(adapter, "x" * 5000, NOON)
    assert catalogue.entry(adapter).reason == "x" * 1000


def test_of_two_verdicts_at_once_exactly_one_stands(catalogue: Catalogue, store: Store, enter: Enter) -> None:
    adapter = enter(ready=False)
    before = catalogue.revision()
    start = threading.Barrier(8)
    won: list[State] = []

    def decide(state: State) -> None:
        own = Catalogue(store, [TINY])
        start.wait()
        ready = state == State.READY
        if own.mark_ready(adapter, NOON) if ready else own.reject(adapter, "no effect", NOON):
            won.append(state)

    threads = [threading.Thread(target=decide, args=(state,)) for state in [State.READY, State.REJECTED] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [catalogue.state(adapter)]
    assert catalogue.revision() == before + 1


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
    with pytest.raises(CatalogueError, match="decoder layers"):
        target_suffixes(tmp_path)


# What engines should have


def test_engines_should_have_all_but_the_rejected_and_the_retired(catalogue: Catalogue, enter: Enter) -> None:
    ready, pending, rejected, retired = enter(1), enter(2, ready=False), enter(3, ready=False), enter(4)
    other = enter(1, TIDEWATER)
    catalogue.reject(rejected, "no effect", NOON)
    catalogue.retire(retired, NOON)
    catalogue.pin(other, True)
    assert catalogue.desired(TINY) == [
        Desired(ready, State.READY, False),
        Desired(pending, State.PENDING, False),
        Desired(other, State.READY, True),
    ]
    assert catalogue.desired("other") == []


def test_the_revision_grows_with_every_change_and_only_then(
    catalogue: Catalogue, base: Path, published: Path, enter: Enter
) -> None:
    first, second = enter(1, ready=False), enter(2, ready=False)
    steps: list[tuple[bool, Callable[[], object]]] = [
        (True, lambda: catalogue.register(published, at=NOON, base_dir=base, max_rank=RANK)),
        (False, lambda: catalogue.register(published, at=NOON, base_dir=base, max_rank=RANK)),
        (True, lambda: catalogue.promote(first, at=NOON)),
        (True, lambda: catalogue.mark_ready(first, NOON)),
        (False, lambda: catalogue.mark_ready(first, NOON)),
        (False, lambda: catalogue.reject(first, "late", NOON)),
        (True, lambda: catalogue.pin(first, True)),
        (False, lambda: catalogue.pin(first, True)),
        (True, lambda: catalogue.pin(first, False)),
        (True, lambda: catalogue.retire(second, NOON)),
        (False, lambda: catalogue.retire(second, LATER)),
        (True, lambda: catalogue.reject(second, "no effect", NOON)),
    ]
    for number, (changes, step) in enumerate(steps):
        before = catalogue.revision()
        step()
        assert (catalogue.revision() > before) == changes, number


def test_changes_of_the_catalogue_at_once_are_all_counted(
    catalogue: Catalogue, store: Store, enter: Enter
) -> None:
    adapter = enter()
    before = catalogue.revision()

    def promote() -> None:
        for _ in range(5):
            Catalogue(store, [TINY]).promote(adapter, at=NOON)

    threads = [threading.Thread(target=promote) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert catalogue.revision() == before + 20


# Pinning and retiring


def test_a_rejected_or_retired_version_cannot_be_pinned_but_unpinned(
    catalogue: Catalogue, enter: Enter
) -> None:
    rejected, retired = enter(1, ready=False), enter(2)
    for adapter in (rejected, retired):
        catalogue.pin(adapter, True)
    catalogue.reject(rejected, "no effect", NOON)
    catalogue.retire(retired, NOON)
    for adapter in (rejected, retired):
        with pytest.raises(CatalogueError):
            catalogue.pin(adapter, True)
        catalogue.pin(adapter, False)
        assert not catalogue.entry(adapter).pinned


def test_a_retired_version_does_not_exist_for_its_tenant_and_stays_retired(
    catalogue: Catalogue, store: Store, base: Path, enter: Enter, tmp_path: Path
) -> None:
    adapter = enter()
    catalogue.retire(adapter, NOON)
    catalogue.retire(adapter, LATER)
    with pytest.raises(ModelNotFound):
        resolve(catalogue, store, LUMEN, adapter.model)
    assert names(catalogue) == [TINY]
    with pytest.raises(CatalogueError, match="retired"):
        catalogue.promote(adapter, at=LATER)
    again = adapter.path(tmp_path / "adapters")
    catalogue.register(again, at=LATER, base_dir=base, max_rank=RANK)
    assert catalogue.entry(adapter).retired_at == NOON


def test_a_version_that_an_alias_means_or_will_mean_is_not_retired(
    catalogue: Catalogue, enter: Enter
) -> None:
    old, new = enter(1), enter(2, ready=False)
    for adapter in (old, new):
        catalogue.promote(adapter, at=NOON)
    for adapter in (old, new):
        with pytest.raises(CatalogueError, match=f"The alias '{SUPPORT}' points to"):
            catalogue.retire(adapter, NOON)
    catalogue.mark_ready(new, NOON)
    catalogue.retire(old, NOON)
    assert names(catalogue) == [TINY, SUPPORT, new.model]


def test_a_promoted_version_that_was_rejected_may_be_retired(catalogue: Catalogue, enter: Enter) -> None:
    adapter = enter(ready=False)
    catalogue.promote(adapter, at=NOON)
    catalogue.reject(adapter, "no effect", NOON)
    catalogue.retire(adapter, LATER)
    assert catalogue.entry(adapter).retired_at == LATER


@pytest.mark.parametrize(
    "ask",
    [
        lambda catalogue: catalogue.find(NOBODY.tenant, NOBODY.name, NOBODY.version),
        lambda catalogue: catalogue.state(NOBODY),
        lambda catalogue: catalogue.entry(NOBODY),
        lambda catalogue: catalogue.promote(NOBODY, at=NOON),
        lambda catalogue: catalogue.pin(NOBODY, True),
        lambda catalogue: catalogue.retire(NOBODY, NOON),
    ],
)
def test_an_unknown_version_is_unknown(catalogue: Catalogue, ask: Callable[[Catalogue], object]) -> None:
    with pytest.raises(UnknownRecord, match="no registered version"):
        ask(catalogue)
    assert not catalogue.mark_ready(NOBODY, NOON)
    assert catalogue.revision() == 0
