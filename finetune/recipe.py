"""The recipe of a training run, from its YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from finetune.config_files import parse, read_yaml
from finetune.hashing import json_sha256


class Recipe(BaseModel):
    """All settings of a training run except its data and its base. Its hash identifies them.

    `top_layers` is the number of layers, counted from the output, that carry LoRA; null means all. The layers
    below them stay as they are and run once per row, not once per epoch, so fewer layers buy more epochs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rank: int = Field(ge=1, le=64)
    alpha: int = Field(ge=1, le=512)
    dropout: float = Field(ge=0, lt=1)
    target_modules: tuple[Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")], ...] = Field(min_length=1)
    top_layers: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(gt=0, le=1)
    epochs: int = Field(ge=1, le=100)
    batch_size: int = Field(ge=1, le=256)
    max_length_tokens: int = Field(ge=16, le=8192)
    warmup_fraction: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0, le=1)
    grad_clip: float = Field(gt=0)
    heldout_fraction: float = Field(default=0.15, ge=0.05, le=0.5)
    seed: int = Field(ge=0, lt=2**32)

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole recipe as JSON values, as a card holds it."""
        return self.model_dump(mode="json")

    @property
    def sha256(self) -> str:
        return json_sha256(self.to_dict())


def load_recipe(path: Path) -> Recipe:
    """Loads a recipe from a YAML file.

    Raises:
        ConfigInvalid: with every problem of the file, not just the first.
    """
    return parse(Recipe, read_yaml(path), path)
