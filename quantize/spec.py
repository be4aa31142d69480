"""What the YAML files under configs/bases and configs/quantize may say."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantize.card import BaseName, Count, Sha256, problems_of
from quantize.errors import SpecInvalid

SpecT = TypeVar("SpecT", bound="Spec")


class Spec(BaseModel):
    """Settings that determine the bytes of an artefact."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class GgufSource(Spec):
    """A GGUF file inside an installed Python package, pinned by its hash."""

    package: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
    file: Annotated[str, Field(pattern=r"^[\w.-]+\.gguf$")]
    sha256: Sha256


class RandomLlama(Spec):
    """Shape and seed of a Llama that knows nothing: for tests of plumbing, where only speed matters."""

    seed: int
    hidden_size: Count
    intermediate_size: Count
    layers: Count
    attention_heads: Count
    key_value_heads: Count
    head_size: Count
    max_context_tokens: Count


class BaseSpec(Spec):
    """Where a base comes from. With `random_llama`, only the tokenizer is taken from the GGUF.

    `chat_template` replaces the tokenizer's: a Jinja file beside the YAML, and its text once it is read, so
    that the recipe is whole. The parsers are names of vLLM's: how the model writes tool calls and reasoning.
    """

    name: BaseName
    source: str
    licence: str
    gguf: GgufSource
    chat_template: str | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    random_llama: RandomLlama | None = None


class GateSpec(Spec):
    """Passed when the upper end of the 95% interval of the perplexity ratio is at most this."""

    perplexity_ratio_max: Annotated[float, Field(gt=0)]


class QuantizeSpec(Spec):
    """How a base is quantized, on which text it is measured, and what it must achieve."""

    scheme: Literal["bnb-nf4"]
    double_quantization: bool
    compute_dtype: Literal["bfloat16", "float32"]
    text: str
    # Below eight windows a confidence interval says little; above the other two bounds a run takes hours.
    windows: Annotated[int, Field(ge=8, le=4096)]
    window_tokens: Annotated[int, Field(ge=32, le=4096)]
    gate: GateSpec


def read_spec(path: Path, kind: type[SpecT]) -> SpecT:
    """Read a YAML file as `kind`. Raises SpecInvalid, with every problem in one message."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(name := content.get("chat_template"), str):
            template = (path.parent / Path(name).name).read_text(encoding="utf-8")
            content["chat_template"] = template.rstrip("\n")
        return kind.model_validate(content)
    except ValidationError as error:
        raise SpecInvalid(str(path), problems_of(error)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecInvalid(str(path), " ".join(str(error).split())) from None


def recipe_sha256(spec: Spec, **inputs: str) -> str:
    """Hash of everything that determines an artefact: its settings and the hashes of its inputs."""
    recipe = {"spec": spec.model_dump(mode="json"), "inputs": inputs}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
