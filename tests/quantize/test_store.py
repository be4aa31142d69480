"""A base appears whole or not at all, under a plain name, from one builder at a time."""

import fcntl
from pathlib import Path

import pytest

from quantize.errors import NameInvalid
from quantize.store import base_dir, locked, rejected_dir, staged


def visible(bases_root: Path) -> list[str]:
    return sorted(path.name for path in bases_root.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("name", ["tiny", "smollm2-135m", "llama-3.2-1b_it", "a" * 64])
def test_plain_names_are_directories_of_the_root(tmp_path: Path, name: str) -> None:
    assert base_dir(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc",
        "a\\b",
        "~",
        ".rejected",
        "a..b",
        "a@b",
        "A",
        "a\n",
        "a\0",
        "é",
        "a" * 65,
    ],
)
def test_names_that_could_be_paths_aliases_or_versions_are_refused(tmp_path: Path, name: str) -> None:
    for place in (base_dir, rejected_dir):
        with pytest.raises(NameInvalid):
            place(tmp_path, name)


def test_a_finished_build_appears_whole_and_readable_by_others(tmp_path: Path) -> None:
    with staged(tmp_path / "base") as draft:
        (draft / "weights").write_text("new")
        (draft / "weights").chmod(0o600)
        assert visible(tmp_path) == []
    assert (tmp_path / "base" / "weights").read_text() == "new"
    assert (tmp_path / "base" / "weights").stat().st_mode & 0o777 == 0o644


def _interrupted_build(directory: Path) -> None:
    with staged(directory) as draft:
        (draft / "weights").write_text("half")
        raise KeyboardInterrupt


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _interrupted_build(tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_the_previous_base(tmp_path: Path) -> None:
    with staged(tmp_path / "base") as draft:
        (draft / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        _interrupted_build(tmp_path / "base")
    assert (tmp_path / "base" / "weights").read_text() == "old"


def test_what_a_killed_builder_left_is_invisible_and_cleared_by_the_next(tmp_path: Path) -> None:
    killed = staged(tmp_path / "base")
    (killed.__enter__() / "half").write_text("written")
    assert visible(tmp_path) == []
    with staged(tmp_path / "base") as draft:
        assert list(draft.iterdir()) == []
    assert list((tmp_path / "base").iterdir()) == []


def test_a_new_build_replaces_the_old_one_entirely(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with staged(tmp_path / "base") as draft:
            (draft / name).write_text(name)
    assert [path.name for path in tmp_path.rglob("*")] == ["base", "new"]


def test_one_builder_at_a_time(tmp_path: Path) -> None:
    def is_locked() -> bool:
        with (tmp_path / ".base.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    with locked(tmp_path / "base"):
        assert is_locked()
    assert not is_locked()
