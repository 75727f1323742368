"""Every integration has a page, which the overview links; links on the pages lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/integrations"
MODULES = sorted(
    path.stem for path in (ROOT / "rlkern/integrations").glob("*.py") if path.stem[0] != "_"
)


@pytest.mark.parametrize("name", MODULES)
def test_a_page_each(name):
    page = PAGES / f"{name}.md"
    assert f"rlkern.integrations.{name}" in page.read_text() or f"import {name}" in page.read_text()
    assert f"({name}.md)" in (PAGES / "README.md").read_text()


@pytest.mark.parametrize("page", sorted(path.name for path in PAGES.glob("*.md")))
def test_links(page):
    for target in re.findall(r"\]\(([^)#]*)#?[^)]*\)", (PAGES / page).read_text()):
        if target and "://" not in target:
            assert (PAGES / target).is_file(), f"{page}: {target}"


def test_importing_them_replaces_nothing():
    """All but verl, whose import is the act."""
    names = ", ".join(f"rlkern.integrations.{name}" for name in sorted(set(MODULES) - {"verl"}))
    others = {"trl", "verl", "peft", "megatron"}
    told = f"import sys, {names}; print(*{others} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
