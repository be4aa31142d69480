"""Writes small real bases and adapters, and a state folder with them, without torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from finetune.card import CARD_NAME, content_version, write_card
from tests.support.finetune_samples import card_for

HIDDEN, INTERMEDIATE, RANK, LAYERS = 6, 10, 2, (0, 1)
SHAPES = {"self_attn.q_proj": (HIDDEN, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN)}
LINEARS = {f"model.layers.{layer}.{name}": shape for layer in LAYERS for name, shape in SHAPES.items()}
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": 4,
    "bias": "none",
    "target_modules": ["q_proj", "up_proj"],
}
UP = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
UP_A, UP_B = UP.format("A"), UP.format("B")

TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
Tensors = dict[str, np.ndarray[Any, Any]]


def lora() -> Tensors:
    random = np.random.default_rng(7)
    tensors = {}
    for module, (rows, columns) in LINEARS.items():
        for half, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = random.normal(size=shape).astype("f4")
    return tensors


def write_safetensors(path: Path, tensors: Tensors, dtypes: dict[str, str] | None = None) -> None:
    """safetensors' own writer, with some tensors renamed to a dtype that numpy lacks."""
    save_file(tensors, path)
    for name, dtype in (dtypes or {}).items():
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header[name]["dtype"] = dtype
        write_raw(path, header, raw[8 + length :])


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_base(directory: Path) -> Path:
    directory.mkdir()
    tensors = {f"{module}.weight": np.ones(shape, np.float16) for module, shape in LINEARS.items()}
    tensors["model.embed_tokens.weight"] = np.ones((8, HIDDEN), np.float16)
    tensors["model.layers.0.input_layernorm.weight"] = np.ones(HIDDEN, np.float16)
    tensors["projector.linear.weight"] = np.ones((HIDDEN, HIDDEN), np.float16)
    save_file(tensors, directory / "model.safetensors")
    return directory


def write_adapter(directory: Path, tensors: Tensors | None = None, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    (directory / "card.json").write_text("{}")
    save_file(lora() if tensors is None else tensors, directory / "adapter_model.safetensors")
    return directory


def publish_base(home: Path, base: str) -> Path:
    directory = home / "bases" / base
    directory.parent.mkdir(parents=True, exist_ok=True)
    return write_base(directory)


def publish_sample(home: Path, tenant: str, name: str, *, alpha: int = 4, **card: Any) -> Path:
    """Publish an adapter. Another `alpha` makes another version; `card` changes the card's fields."""
    staged = home / f"staged-{tenant}-{alpha}"
    staged.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(staged, lora_alpha=alpha)
    (staged / CARD_NAME).unlink()
    directory = home / "adapters" / tenant / name / content_version(staged)
    directory.parent.mkdir(parents=True, exist_ok=True)
    write_card(staged, card_for(staged, tenant=tenant, adapter=name, rank=RANK, **card))
    return staged.rename(directory)
