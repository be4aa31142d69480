"""Training writes an adapter's two files, reproducibly, and stops when it diverges."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.card import content_version
from finetune.errors import BaseUnusable, TooFewRows, TrainingDiverged
from finetune.recipe import Recipe
from finetune.train.loop import train
from tests.support.finetune_samples import lesson, write_lines


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "train.jsonl", lesson(20))


def test_the_loss_falls_and_each_step_is_reported(
    tiny_base: Path, train_file: Path, tmp_path: Path, recipe: Recipe
) -> None:
    steps_seen: list[tuple[int, int, float, float]] = []
    result = train(
        tiny_base,
        train_file,
        tmp_path / "out",
        base="tiny",
        recipe=recipe,
        on_step=lambda *step: steps_seen.append(step),
    )
    assert [step for step, *_ in steps_seen] == list(range(1, 10))
    assert all(steps == result.steps == 9 and rate > 0 for _, steps, _, rate in steps_seen)
    assert result.final_loss < 0.9 * steps_seen[0][2]


def test_only_the_two_files_of_an_adapter_are_written_and_no_path_in_them(
    tiny_base: Path, train_file: Path, tmp_path: Path, recipe: Recipe
) -> None:
    out = tmp_path / "out"
    train(tiny_base, train_file, out, base="tiny", recipe=recipe)
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    text = (out / "adapter_config.json").read_text()
    assert str(tmp_path.parent) not in text
    config = json.loads(text)
    assert config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == sorted(recipe.target_modules)


def test_lora_is_on_the_top_layers_only(
    tiny_base: Path, train_file: Path, tmp_path: Path, recipe: Recipe
) -> None:
    train(tiny_base, train_file, tmp_path / "out", base="tiny", recipe=recipe)
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(weights) == 2 * 3 * 2
    assert {name.split(".layers.")[1].split(".")[0] for name in weights} == {"2", "3"}
    assert all(bool(weight.any()) for weight in weights.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_same_seed_and_data_give_the_same_version_and_another_seed_does_not(
    tiny_base: Path, train_file: Path, tmp_path: Path, recipe: Recipe, dropout: float
) -> None:
    versions = []
    for run, seed in enumerate((7, 7, 8)):
        out = tmp_path / f"run-{run}"
        changed = recipe.model_copy(update={"seed": seed, "dropout": dropout})
        train(tiny_base, train_file, out, base="tiny", recipe=changed)
        versions.append(content_version(out))
    assert versions[0] == versions[1] != versions[2]


def test_caching_the_frozen_layers_output_changes_nothing_but_time(
    tiny_base: Path, train_file: Path, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_base, train_file, tmp_path / "cached", base="tiny", recipe=recipe)
    monkeypatch.setattr("finetune.train.loop.CACHE_BYTES_MAX", 0)
    train(tiny_base, train_file, tmp_path / "recomputed", base="tiny", recipe=recipe)
    cached, recomputed = (
        load_file(tmp_path / run / "adapter_model.safetensors") for run in ("cached", "recomputed")
    )
    torch.testing.assert_close(cached, recomputed, rtol=1e-2, atol=1e-3)


def test_a_step_in_several_packs_is_the_same_step(
    tiny_base: Path, train_file: Path, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_base, train_file, tmp_path / "one", base="tiny", recipe=recipe)
    monkeypatch.setattr("finetune.packing.PACK_TOKENS_MAX", 150)
    train(tiny_base, train_file, tmp_path / "several", base="tiny", recipe=recipe)
    one, several = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("one", "several"))
    torch.testing.assert_close(one, several, rtol=1e-2, atol=1e-3)


def test_all_layers_can_be_trained(tiny_base: Path, train_file: Path, tmp_path: Path, recipe: Recipe) -> None:
    everywhere = recipe.model_copy(update={"top_layers": None})
    train(tiny_base, train_file, tmp_path / "out", base="tiny", recipe=everywhere)
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 4 * 3 * 2


def test_a_loss_that_is_not_finite_stops_training_and_writes_nothing(
    tiny_base: Path, train_file: Path, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "finetune.train.loop.cross_entropy", lambda *_, **__: torch.tensor(math.nan, requires_grad=True)
    )
    with pytest.raises(TrainingDiverged) as caught:
        train(tiny_base, train_file, tmp_path / "out", base="tiny", recipe=recipe)
    assert caught.value.step == 1
    assert not (tmp_path / "out").exists()


def test_a_module_that_the_base_lacks_is_named(
    tiny_base: Path, train_file: Path, tmp_path: Path, recipe: Recipe
) -> None:
    changed = recipe.model_copy(update={"target_modules": ("q_proj", "qq_proj")})
    with pytest.raises(BaseUnusable, match="no modules called qq_proj"):
        train(tiny_base, train_file, tmp_path / "out", base="tiny", recipe=changed)


def test_rows_that_are_all_too_long_are_reported(
    tiny_base: Path, train_file: Path, tmp_path: Path, recipe: Recipe
) -> None:
    changed = recipe.model_copy(update={"max_length_tokens": 16})
    with pytest.raises(TooFewRows, match="20 too_many_tokens"):
        train(tiny_base, train_file, tmp_path / "out", base="tiny", recipe=changed)
