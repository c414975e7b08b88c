"""The snippets of README.md, run from README.md itself."""

import re
from pathlib import Path

import pytest

SNIPPETS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippet_runs(snippet):
    exec(compile(snippet, "README.md", "exec"), {})


def test_readme_has_snippets():
    assert len(SNIPPETS) >= 2
