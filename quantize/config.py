"""Settings from the YAML files under configs/bases and configs/quantize."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantize.card import BaseName, Count, Sha256, problems_of
from quantize.errors import ConfigInvalid

ConfigT = TypeVar("ConfigT", bound="Config")

# An embedding model's files that an engine reads, and those that say how its vectors are made.
COPIED_FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
RECIPE_FILES = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")


class Config(BaseModel):
    """Settings that determine the bytes of an artefact."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class GgufSource(Config):
    """A GGUF file inside an installed Python package, pinned by its hash."""

    package: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
    file: Annotated[str, Field(pattern=r"^[\w.-]+\.gguf$")]
    sha256: Sha256


class EmbeddingSource(Config):
    """A sentence-transformers model inside an installed Python package, each of its files pinned by its hash.

    `extra` names what of Bespoke installs the package.
    """

    package: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
    folder: Annotated[str, Field(pattern=r"^\w+$")]
    extra: Annotated[str, Field(pattern=r"^[a-z]+$")] = "embeddings"
    files_sha256: dict[Annotated[str, Field(pattern=r"^(?:\w+/)?\w+\.(?:safetensors|json)$")], Sha256]

    @model_validator(mode="after")
    def _files_are_whole(self) -> Self:
        if missing := sorted({*COPIED_FILES, *RECIPE_FILES} - self.files_sha256.keys()):
            raise ValueError(f"files_sha256 lacks {', '.join(missing)}")
        return self


class RandomLlama(Config):
    """Shape and seed of a Llama with random weights: for tests of plumbing, where only speed matters."""

    seed: int
    hidden_size: Count
    intermediate_size: Count
    layers: Count
    attention_heads: Count
    key_value_heads: Count
    head_size: Count
    max_context_tokens: Count


class BaseConfig(Config):
    """Settings of a base's import, from a GGUF file or from an embedding model.

    With `random_llama`, only the tokenizer is taken from the GGUF.

    `chat_template` replaces the tokenizer's. The YAML names a Jinja file beside it; reading the YAML puts the
    file's text here, so that the recipe's hash covers it. `tool_parser` and `reasoning_parser` name vLLM's
    parsers for how the model writes tool calls and reasoning.
    """

    name: BaseName
    source: str
    licence: str
    gguf: GgufSource | None = None
    embedding: EmbeddingSource | None = None
    chat_template: str | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    random_llama: RandomLlama | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.gguf is None) == (self.embedding is None):
            raise ValueError("a base has one source: gguf or embedding")
        generating = (self.chat_template, self.tool_parser, self.reasoning_parser, self.random_llama)
        if self.embedding is not None and any(setting is not None for setting in generating):
            raise ValueError("a base of embeddings has no chat template, no parsers and no random weights")
        return self


class GateConfig(Config):
    """Limit of the gate: the upper end of the perplexity ratio's 95% interval must not exceed it."""

    perplexity_ratio_max: Annotated[float, Field(gt=0)]


class QuantizeConfig(Config):
    """Settings of a quantization: the scheme, the evaluation text, and the gate."""

    scheme: Literal["bnb-nf4"]
    double_quantization: bool
    compute_dtype: Literal["bfloat16", "float32"]
    text: str
    # Below eight windows a confidence interval says little; above the other two bounds a run takes hours.
    windows: Annotated[int, Field(ge=8, le=4096)]
    window_tokens: Annotated[int, Field(ge=32, le=4096)]
    gate: GateConfig


def read_config(path: Path, kind: type[ConfigT]) -> ConfigT:
    """Reads a YAML file as `kind`. Raises ConfigInvalid, with every problem in one message."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(name := content.get("chat_template"), str):
            template = (path.parent / Path(name).name).read_text(encoding="utf-8")
            content["chat_template"] = template.rstrip("\n")
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigInvalid(str(path), problems_of(error)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigInvalid(str(path), " ".join(str(error).split())) from None


def recipe_sha256(config: Config, **inputs: str) -> str:
    """Hashes everything that determines an artefact: its settings and the hashes of its inputs."""
    # The key "spec" is older than the class name. Another key would make every published base again.
    spec = config.model_dump(mode="json")
    if spec.get("embedding") is None:  # younger than published bases, too
        spec.pop("embedding", None)
    recipe = {"spec": spec, "inputs": inputs}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
