"""Packs adapters for a worker and keeps them in memory: the tier between the disk and the engine's slots.

A request holds its adapter here from before it is dispatched until it has ended, so the engine's loop finds
it ready whenever the request is scheduled, also again after a preemption. Packed adapters lie in a directory
of this process's own, in shared memory where there is enough of it. A process that is killed cannot remove
its directory, so the next one does.
"""

import asyncio
import json
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from math import sqrt
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from finetune.card import ADAPTER_CONFIG_NAME, WEIGHTS_NAME, CardMismatch, read_card, verify
from serve.registry.versions import AdapterVersion
from serve.vllm_plugin import packed
from serve.vllm_plugin.packed import Layout, Unpackable

_PREFIX = "bespoke-adapters-"
_SHARED_MEMORY = Path("/dev/shm")
_FREE_BYTES_MIN = 2 << 30


def make_directory() -> Path:
    """Makes a new directory that only this user can read, and removes those of dead processes first."""
    sweep_directories()
    parent = Path(tempfile.gettempdir())
    # A file there is written eight times as fast as on a disk. Containers often have only 64 MB of it.
    if os.access(_SHARED_MEMORY, os.W_OK) and shutil.disk_usage(_SHARED_MEMORY).free >= _FREE_BYTES_MIN:
        parent = _SHARED_MEMORY
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))


def sweep_directories() -> None:
    """Removes the directories of processes that are gone."""
    for parent in (_SHARED_MEMORY, Path(tempfile.gettempdir())):
        for folder in parent.glob(f"{_PREFIX}*"):
            pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)


_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(eq=False)
class _Pack:
    """Holds one adapter that is packed, or being packed, and counts the requests that use it."""

    task: asyncio.Task[Path]
    users: int = 0

    @property
    def failed(self) -> bool:
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)


class AdapterCache:
    """Keeps at most `capacity` adapters in memory. It evicts the longest unused first, never one in use.

    `layout` None means that we cannot pack for the worker's layout. Then an adapter is verified and given to
    `preload` as it is.
    """

    def __init__(
        self,
        layout: Layout | None,
        adapters_dir: Path,
        directory: Path,
        *,
        capacity: int,
        preload: Callable[[AdapterVersion, Path], Awaitable[None]],
    ) -> None:
        self._preload = preload
        self._layout = layout
        self._adapters_dir = adapters_dir
        self._directory = directory
        self._capacity = capacity
        self._packs: OrderedDict[int, _Pack] = OrderedDict()
        self.pinned: frozenset[int] = frozenset()
        self.loads = 0
        self.load_s = 0.0
        self.evictions = 0

    @property
    def cached_ids(self) -> list[int]:
        """Ids of the adapters in memory."""
        return sorted(id for id, pack in self._packs.items() if pack.task.done() and not pack.failed)

    def has(self, adapter: int) -> bool:
        """True if the adapter is in memory, or being loaded for another request."""
        pack = self._packs.get(adapter)
        return pack is not None and not pack.failed

    @asynccontextmanager
    async def hold(self, ref: AdapterVersion) -> AsyncIterator[Path]:
        """Holds the adapter in memory, and gives the directory to name to the engine.

        It is packed once, however many requests hold it. Raises FinetuneError or OSError if its bytes are not
        those of its card or are gone, and what `preload` raises.
        """
        pack = self._packs.get(ref.id)
        if pack is None or pack.failed:
            pack = self._packs[ref.id] = _Pack(asyncio.create_task(self._load(ref)))
        pack.users += 1
        self._packs.move_to_end(ref.id)
        try:
            yield await asyncio.shield(pack.task)  # one client's disconnect must not undo another's load
        finally:
            pack.users -= 1
            if pack.failed and self._packs.get(ref.id) is pack:
                del self._packs[ref.id]
            self._evict()

    def drop(self, adapter: int) -> bool:
        """Drops an adapter, unless a request still holds it. True if it is gone."""
        pack = self._packs.get(adapter)
        if pack is None or pack.users or not pack.task.done():
            return pack is None
        del self._packs[adapter]
        shutil.rmtree(self._directory / str(adapter), ignore_errors=True)
        return True

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _load(self, ref: AdapterVersion) -> Path:
        started_s = perf_counter()
        path = await asyncio.to_thread(self._pack, ref)
        if path == ref.path(self._adapters_dir):
            await self._preload(ref, path)
        self.loads += 1
        self.load_s += perf_counter() - started_s
        return path

    def _pack(self, ref: AdapterVersion) -> Path:
        source = ref.path(self._adapters_dir)
        if self._layout is None:
            verify(source)
            return source
        tensors, config = read_verified(source)
        rank, alpha = config["r"], config["lora_alpha"]
        scaling = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
        fresh, ready = self._directory / f"{ref.id}.new", self._directory / str(ref.id)
        for leftover in (fresh, ready):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            packed.pack(tensors, rank=rank, scaling=scaling, layout=self._layout, directory=fresh)
        except Unpackable:
            return source  # vLLM's own loader judges it
        fresh.rename(ready)
        return ready

    def _evict(self) -> None:
        for adapter, pack in list(self._packs.items()):
            if len(self._packs) <= self._capacity:
                return
            if not pack.users and pack.task.done() and adapter not in self.pinned:
                self.drop(adapter)
                self.evictions += 1


def read_verified(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the tensors and the configuration of a published adapter, and verifies them against its card.

    It hashes and parses the bytes of one read: otherwise a file could change in between.
    Raises CardUnreadable, CardMismatch, OSError.
    """
    import torch

    card = read_card(directory)
    # Writable, because PyTorch warns of buffers that it could write to and must not.
    weights = np.fromfile(directory / WEIGHTS_NAME, dtype=np.uint8)
    config = (directory / ADAPTER_CONFIG_NAME).read_bytes()
    for field, data in (("weights_sha256", weights.data), ("adapter_config_sha256", config)):
        if (digest := sha256(data).hexdigest()) != getattr(card, field):
            raise CardMismatch(directory, field, getattr(card, field), digest)
    # safetensors: 8 bytes of length, a JSON header, the tensors. Its own reader takes 15 ms for 420 of them.
    start = 8 + int.from_bytes(weights[:8].tobytes(), "little")
    buffer = torch.from_numpy(weights[start:])
    tensors = {}
    for name, entry in json.loads(weights[8:start].tobytes()).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            dtype = getattr(torch, _DTYPES[entry["dtype"]])
            part = buffer[begin:end]
            # A tensor behind one of a narrower type may lie where its own type may not.
            part = part.clone() if begin % dtype.itemsize else part
            tensors[name] = part.view(dtype).view(entry["shape"])
    return tensors, json.loads(config)
