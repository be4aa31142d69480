"""Import a base: a pinned GGUF file becomes a checkpoint that transformers, PEFT and vLLM load."""

import json
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantize.card import (
    WEIGHTS,
    BaseCard,
    check_sha256,
    checkpoint_files,
    library_versions,
    sha256_of,
    write_card,
)
from quantize.errors import SourceMissing
from quantize.progress import OnProgress, silent
from quantize.spec import BaseSpec, GgufSource, recipe_sha256
from quantize.store import base_dir, is_current, locked, staged


def import_base(spec: BaseSpec, bases_root: Path, on_progress: OnProgress = silent) -> Path:
    """Make `<bases_root>/<name>/` from the spec; keep it when it is there, intact and from this spec.

    The directory holds bfloat16 safetensors, tokenizer, chat template, generation configuration and
    card.json. It appears whole or not at all, and nothing is fetched from a network. Raises SourceMissing
    when the GGUF is not installed, ChecksumMismatch when it is not the pinned one.
    """
    home = base_dir(bases_root, spec.name)
    recipe = recipe_sha256(spec)
    with locked(home):
        on_progress("checking what is there", 0.0)
        if is_current(home, recipe):
            return home
        on_progress("verifying the source", 0.05)
        gguf = _locate(spec.gguf)
        check_sha256(gguf, spec.gguf.sha256)
        from quantize import checkpoint  # torch: seconds that a base which is there need not cost

        with staged(home) as draft:
            on_progress("reading the tokenizer", 0.1)
            tokenizer = checkpoint.load_tokenizer(gguf)
            on_progress("loading the weights", 0.2)
            if spec.random_llama is None:
                model = checkpoint.dequantized(gguf)
            else:
                model = checkpoint.random_llama(spec.random_llama, tokenizer)
            on_progress("writing the checkpoint", 0.9)
            if spec.chat_template is not None:
                tokenizer.chat_template = spec.chat_template
            checkpoint.save(model, tokenizer, draft)
            write_card(
                draft,
                BaseCard(
                    name=spec.name,
                    source=spec.source,
                    licence=spec.licence,
                    parameters=sum(parameter.numel() for parameter in model.parameters()),
                    scheme="bfloat16",
                    tool_parser=spec.tool_parser,
                    reasoning_parser=spec.reasoning_parser,
                    recipe_sha256=recipe,
                    libraries=library_versions(("torch", "transformers", "gguf", "safetensors")),
                    **facts_of(draft),
                ),
            )
        on_progress("imported", 1.0)
    return home


def facts_of(directory: Path) -> dict[str, Any]:
    """The fields of a card that are read off a finished checkpoint: shape, sizes, hashes, and the time."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    files = checkpoint_files(directory)
    hashes = {path.name: sha256_of(path) for path in files}
    return {
        "architecture": config["architectures"][0],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "max_context_tokens": config["max_position_embeddings"],
        "weights_sha256": hashes.pop(WEIGHTS),
        "files_sha256": hashes,
        "bytes_on_disk": sum(path.stat().st_size for path in files),
        "created_at": datetime.now(UTC),
    }


def _locate(source: GgufSource) -> Path:
    """The GGUF inside its package, which is not imported: it may want a runtime that we do not have."""
    package = find_spec(source.package)
    for folder in package.submodule_search_locations or () if package else ():
        path = Path(folder) / source.file
        if path.is_file():
            return path
    raise SourceMissing(source.package, source.file)
