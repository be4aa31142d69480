"""The README's examples do what they say, in every language that it gives."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.constants import TENANTS
from tests.support.live_service import LiveService

pytestmark = pytest.mark.slow

README = (Path(__file__).parents[3] / "README.md").read_text()
BLOCKS = re.findall(r"^```(python|js|sh)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
EXAMPLES = [(language, code) for language, code in BLOCKS if "127.0.0.1:8000" in code]


@pytest.mark.parametrize(("language", "code"), EXAMPLES, ids=[language for language, _ in EXAMPLES])
def test_an_example_of_the_readme_runs_as_it_stands(
    live: LiveService, node_folder: Path, language: str, code: str
) -> None:
    assert TENANTS[0] + "/support" in code
    code = code.replace("http://127.0.0.1:8000", live.url)
    code = code.replace("bsk-…", live.keys[TENANTS[0]]).replace("$KEY", live.keys[TENANTS[0]])
    if language == "js":
        (node_folder / "readme.mjs").write_text(code)
    command = {
        "python": [sys.executable, "-c", code],
        "js": ["node", "readme.mjs"],
        "sh": ["bash", "-euc", code],
    }[language]
    done = subprocess.run(command, cwd=node_folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if language == "sh":
        assert done.stdout.rstrip().endswith("data: [DONE]")


def test_the_readme_shows_three_clients_and_curl() -> None:
    assert sorted(language for language, _ in EXAMPLES) == ["js", "python", "python", "sh"]
