"""A state folder with a small real base and published adapters for it, made without torch."""

from pathlib import Path
from typing import Any

from finetune.card import CARD_NAME, content_version, write_card
from tests.finetune.conftest import card_for
from tests.serve.test_lora_files import RANK, write_adapter, write_base

__all__ = ["RANK", "publish_base", "publish_sample"]


def publish_base(home: Path, base: str) -> Path:
    directory = home / "bases" / base
    directory.parent.mkdir(parents=True, exist_ok=True)
    return write_base(directory)


def publish_sample(home: Path, tenant: str, name: str, *, alpha: int = 4, **card: Any) -> Path:
    """Another `alpha` makes another version; `card` changes what the card says."""
    staged = home / f"staged-{tenant}-{alpha}"
    staged.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(staged, lora_alpha=alpha)
    (staged / CARD_NAME).unlink()
    directory = home / "adapters" / tenant / name / content_version(staged)
    directory.parent.mkdir(parents=True, exist_ok=True)
    write_card(staged, card_for(staged, tenant=tenant, adapter=name, rank=RANK, **card))
    return staged.rename(directory)
