"""Configuration files in YAML, read so that every problem of a file is reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from finetune.errors import ConfigInvalid

_CONFIG_BYTES_MAX = 64 << 10

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the mapping at the top of a YAML file.

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
    """Validates a mapping as a pydantic model. Raises ConfigInvalid, naming every field that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = tuple(
            f"{'.'.join(str(part) for part in problem['loc']) or 'file'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise ConfigInvalid(path, problems) from error
