"""Every shipped YAML file is valid, and every problem of a bad one is reported."""

from pathlib import Path

import pytest

from quantize.config import BaseConfig, Config, QuantizeConfig, read_config, recipe_sha256
from quantize.errors import ConfigInvalid

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = [(path, BaseConfig) for path in sorted((CONFIGS / "bases").glob("*.yaml"))] + [
    (path, QuantizeConfig) for path in sorted((CONFIGS / "quantize").glob("*.yaml"))
]


@pytest.mark.parametrize(("path", "kind"), SHIPPED, ids=lambda value: getattr(value, "stem", ""))
def test_shipped_configurations_are_valid_and_open_with_their_command(path: Path, kind: type[Config]) -> None:
    read_config(path, kind)
    command = "base import" if kind is BaseConfig else "quantize run"
    assert path.read_text().startswith(f"# bespoke {command} {path.relative_to(CONFIGS.parent)}")


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: UPPER\nlicence: MIT\nsize: 3\ngguf: {package: p, file: f.gguf, sha256: short}\n")
    with pytest.raises(ConfigInvalid) as caught:
        read_config(path, BaseConfig)
    assert all(word in str(caught.value) for word in ("name", "source", "size", "gguf.sha256", str(path)))


@pytest.mark.parametrize("content", [b"", b"- 1", b"a: [", b"\xff"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigInvalid):
        read_config(path, QuantizeConfig)


@pytest.mark.parametrize("file", ["../model.gguf", "a/b.gguf", "model.bin", "/model.gguf"])
def test_a_source_is_a_gguf_inside_its_package(tiny_config: BaseConfig, file: str) -> None:
    with pytest.raises(ValueError, match="file"):
        type(tiny_config.gguf).model_validate(tiny_config.gguf.model_dump() | {"file": file})


def test_a_recipe_changes_with_any_setting_and_any_input(nf4_config: QuantizeConfig) -> None:
    other = nf4_config.model_copy(update={"double_quantization": not nf4_config.double_quantization})
    recipes = {
        recipe_sha256(nf4_config, parent="a", text="b"),
        recipe_sha256(nf4_config, parent="a", text="c"),
        recipe_sha256(nf4_config, parent="c", text="b"),
        recipe_sha256(other, parent="a", text="b"),
    }
    assert len(recipes) == 4
    assert recipe_sha256(nf4_config, parent="a", text="b") in recipes
