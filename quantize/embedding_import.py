"""Imports a base that makes embeddings: files in sentence-transformers' layout, copied as they are.

sbert.net/docs/sentence_transformer/usage/custom_models.html: `modules.json` lists the steps from a text to
its vector. The card keeps what they say, and the engine is configured from the card.
"""

import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from quantize.card import (
    WEIGHTS,
    BaseCard,
    EmbeddingFacts,
    check_sha256,
    checkpoint_facts,
    library_versions,
    write_card,
)
from quantize.config import COPIED_FILES, BaseConfig, EmbeddingSource
from quantize.errors import SourceMissing, SourceUnsupported

_STEPS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_POOLINGS: dict[str, Literal["mean", "cls"]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}


def verified_files(source: EmbeddingSource) -> Path:
    """Returns the folder of the source's files, whose bytes are the pinned ones. Its package is not imported.

    Raises SourceMissing, ChecksumMismatch.
    """
    package = find_spec(source.package)
    roots = package.submodule_search_locations or () if package else ()
    for root in map(Path, roots):
        if (root / source.folder).is_dir():
            break
    else:
        raise SourceMissing(source.package, source.folder, source.extra)
    for name, sha256 in source.files_sha256.items():
        if not (path := root / source.folder / name).is_file():
            raise SourceMissing(source.package, name, source.extra)
        check_sha256(path, sha256)
    return root / source.folder


def write_embedding_base(
    config: BaseConfig, source: EmbeddingSource, files: Path, draft: Path, recipe: str
) -> None:
    """Writes the checkpoint and the card of a base whose verified `files` are there.

    Raises SourceUnsupported.
    """
    for name in COPIED_FILES:
        shutil.copyfile(files / name, draft / name)
    model = _json(files / "config.json")
    embedding, tokens_max = embedding_facts(source, files, model["hidden_size"])
    from safetensors import safe_open

    with safe_open(draft / WEIGHTS, framework="numpy") as weights:
        slices = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118 # it is no dict
        learned = [each for each in slices if each.get_dtype() != "I64"]  # BERT saves its position ids
        parameters = sum(math.prod(each.get_shape()) for each in learned)
        dtypes = {each.get_dtype() for each in learned}
    if dtypes != {"F32"}:
        raise _unsupported(source, WEIGHTS, f"its weights are {', '.join(sorted(dtypes))}, expected F32")
    facts = checkpoint_facts(draft)
    facts["max_context_tokens"] = min(facts["max_context_tokens"], tokens_max)
    write_card(
        draft,
        BaseCard(
            name=config.name,
            source=config.source,
            licence=config.licence,
            parameters=parameters,
            embedding=embedding,
            scheme="float32",
            recipe_sha256=recipe,
            libraries=library_versions(("safetensors",)),
            **facts,
        ),
    )


def embedding_facts(source: EmbeddingSource, files: Path, hidden_size: int) -> tuple[EmbeddingFacts, int]:
    """Returns how the model makes a vector, and the most tokens that it was made for.

    Raises SourceUnsupported for a step or a pooling that the engine does not have.
    """
    steps = [str(module["type"]).rpartition(".")[2] for module in _json(files / "modules.json")]
    if steps not in _STEPS:
        raise _unsupported(source, "modules.json", f"its steps are {', '.join(steps)}")
    pooling = _json(files / "1_Pooling" / "config.json")
    modes = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise _unsupported(source, "1_Pooling/config.json", f"its pooling is {', '.join(modes)}")
    transformer = _json(files / "sentence_bert_config.json")
    if transformer.get("do_lower_case"):
        raise _unsupported(source, "sentence_bert_config.json", "it lowers the case before the tokenizer")
    facts = EmbeddingFacts(size=hidden_size, pooling=_POOLINGS[modes[0]], normalized=steps[-1] == "Normalize")
    return facts, transformer["max_seq_length"]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _unsupported(source: EmbeddingSource, file: str, problem: str) -> SourceUnsupported:
    return SourceUnsupported(source.package, file, problem)
