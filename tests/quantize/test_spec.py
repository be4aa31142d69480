from pathlib import Path

import pytest

from quantize.errors import SpecInvalid
from quantize.spec import BaseSpec, QuantizeSpec, Spec, read_spec, recipe_sha256

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = [(path, BaseSpec) for path in sorted((CONFIGS / "bases").glob("*.yaml"))] + [
    (path, QuantizeSpec) for path in sorted((CONFIGS / "quantize").glob("*.yaml"))
]


@pytest.mark.parametrize(("path", "kind"), SHIPPED, ids=lambda value: getattr(value, "stem", ""))
def test_shipped_configurations_are_valid_and_open_with_their_command(path: Path, kind: type[Spec]) -> None:
    read_spec(path, kind)
    command = "base import" if kind is BaseSpec else "quantize run"
    assert path.read_text().startswith(f"# bespoke {command} {path.relative_to(CONFIGS.parent)}")


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: UPPER\nlicence: MIT\nsize: 3\ngguf: {package: p, file: f.gguf, sha256: short}\n")
    with pytest.raises(SpecInvalid) as caught:
        read_spec(path, BaseSpec)
    assert all(word in str(caught.value) for word in ("name", "source", "size", "gguf.sha256", str(path)))


@pytest.mark.parametrize("content", [b"", b"- 1", b"a: [", b"\xff"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecInvalid):
        read_spec(path, QuantizeSpec)


@pytest.mark.parametrize("file", ["../model.gguf", "a/b.gguf", "model.bin", "/model.gguf"])
def test_a_source_is_a_gguf_inside_its_package(tiny_spec: BaseSpec, file: str) -> None:
    with pytest.raises(ValueError, match="file"):
        type(tiny_spec.gguf).model_validate(tiny_spec.gguf.model_dump() | {"file": file})


def test_a_recipe_changes_with_any_setting_and_any_input(nf4_spec: QuantizeSpec) -> None:
    other = nf4_spec.model_copy(update={"double_quantization": not nf4_spec.double_quantization})
    recipes = {
        recipe_sha256(nf4_spec, parent="a", text="b"),
        recipe_sha256(nf4_spec, parent="a", text="c"),
        recipe_sha256(nf4_spec, parent="c", text="b"),
        recipe_sha256(other, parent="a", text="b"),
    }
    assert len(recipes) == 4
    assert recipe_sha256(nf4_spec, parent="a", text="b") in recipes
