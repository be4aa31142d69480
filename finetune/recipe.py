"""How to train: the recipe file, and reading YAML so that all its errors are told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.digest import json_sha256
from finetune.errors import ConfigInvalid

_CONFIG_BYTES_MAX = 64 << 10

Model = TypeVar("Model", bound=BaseModel)


class Recipe(BaseModel):
    """Everything about a training run but its data and its base, so that its hash names it.

    `top_layers` is how many layers, counted from the output, carry LoRA; null means all. The layers below
    them stay as they are and run once per row, not once per epoch, so fewer layers buy more epochs.
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
        """The whole recipe as JSON values, as it is written into a card."""
        return self.model_dump(mode="json")

    @property
    def sha256(self) -> str:
        return json_sha256(self.to_dict())


def load_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file.

    Raises:
        ConfigInvalid: with every problem of the file, not just the first.
    """
    return parse(Recipe, read_yaml(path), path)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping at the top of a YAML file.

    Raises:
        ConfigInvalid: no readable file, not YAML, not a mapping, or larger than 64 KiB.
    """
    try:
        if path.stat().st_size > _CONFIG_BYTES_MAX:
            raise ConfigInvalid(path, (f"larger than {_CONFIG_BYTES_MAX} bytes",))
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid(path, (error.strerror or "cannot be read",)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigInvalid(path, (f"not YAML: {' '.join(str(error).split())}",)) from error
    if not isinstance(value, dict):
        raise ConfigInvalid(path, ("not a mapping",))
    return value


def parse(model: type[Model], value: dict[str, Any], path: Path) -> Model:
    """A mapping as a pydantic model; ConfigInvalid names every field that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = tuple(
            f"{'.'.join(str(part) for part in problem['loc']) or 'file'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise ConfigInvalid(path, problems) from error
