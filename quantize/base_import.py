"""Imports a base: pinned files of a Python package become a checkpoint that transformers and vLLM load."""

from importlib.util import find_spec
from pathlib import Path

from quantize.card import (
    BaseCard,
    check_sha256,
    checkpoint_facts,
    library_versions,
    write_card,
)
from quantize.config import BaseConfig, GgufSource, recipe_sha256
from quantize.embedding_import import verified_files, write_embedding_base
from quantize.errors import SourceMissing
from quantize.progress import OnProgress, silent
from quantize.store import base_dir, is_current, locked, staged


def import_base(config: BaseConfig, bases_root: Path, on_progress: OnProgress = silent) -> Path:
    """Makes the base `<bases_root>/<name>/`, unless it is there, intact, and made from the same settings.

    The directory holds safetensors, tokenizer, chat template, generation configuration and card.json; one
    that makes embeddings has neither of the two in the middle. It appears whole or not at all, and nothing is
    fetched from a network. Raises SourceMissing when a file is not installed, ChecksumMismatch when it is not
    the pinned one, SourceUnsupported when an embedding model's vectors are made in another way than ours.
    """
    home = base_dir(bases_root, config.name)
    recipe = recipe_sha256(config)
    with locked(home):
        on_progress("checking what is there", 0.0)
        if is_current(home, recipe):
            return home
        on_progress("verifying the source", 0.05)
        if config.embedding is not None:
            files = verified_files(config.embedding)
            with staged(home) as draft:
                on_progress("copying the checkpoint", 0.5)
                write_embedding_base(config, config.embedding, files, draft, recipe)
        else:
            assert config.gguf is not None
            _import_gguf(config, config.gguf, home, recipe, on_progress)
        on_progress("imported", 1.0)
    return home


def _import_gguf(
    config: BaseConfig, source: GgufSource, home: Path, recipe: str, on_progress: OnProgress
) -> None:
    gguf = _locate(source)
    check_sha256(gguf, source.sha256)
    from quantize import checkpoint  # here, because torch takes seconds to load: reuse must not wait

    with staged(home) as draft:
        on_progress("reading the tokenizer", 0.1)
        tokenizer = checkpoint.load_tokenizer(gguf)
        on_progress("loading the weights", 0.2)
        if config.random_llama is None:
            model = checkpoint.dequantized(gguf)
        else:
            model = checkpoint.random_llama(config.random_llama, tokenizer)
        on_progress("writing the checkpoint", 0.9)
        if config.chat_template is not None:
            tokenizer.chat_template = config.chat_template
        checkpoint.save(model, tokenizer, draft)
        write_card(
            draft,
            BaseCard(
                name=config.name,
                source=config.source,
                licence=config.licence,
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                scheme="bfloat16",
                tool_parser=config.tool_parser,
                reasoning_parser=config.reasoning_parser,
                recipe_sha256=recipe,
                libraries=library_versions(("torch", "transformers", "gguf", "safetensors")),
                **checkpoint_facts(draft),
            ),
        )


def _locate(source: GgufSource) -> Path:
    """Finds the GGUF inside its package. The package may need a runtime we lack, so it is not imported."""
    package = find_spec(source.package)
    for folder in package.submodule_search_locations or () if package else ():
        path = Path(folder) / source.file
        if path.is_file():
            return path
    raise SourceMissing(source.package, source.file)
