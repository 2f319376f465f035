"""The strict build of the documentation's site refuses links that lead nowhere. `make docs` builds all of it."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def build_with(tmp_path):
    """Builds the pages into a folder, a line added to one of them; the reference stays empty."""

    def built(line: str) -> Path:
        docs = shutil.copytree(ROOT / "docs", tmp_path / "docs")
        page = docs / "pruning.md"
        page.write_text(f"{page.read_text()}\n{line}\n")
        changed = {"docs_dir": str(docs), "site_dir": str(tmp_path / "site"), "plugins": [], "strict": True}
        build(load_config(str(ROOT / "mkdocs.yml"), **changed))
        return tmp_path / "site"

    return built


def test_links_between_readme_docs_and_measurements_lead_to_pages_of_the_site(build_with):
    site = build_with("[measurements](../benchmarks/README.md) and [the result](../README.md#the-whole-method)")
    assert '<a href="measurements.html">' in (site / "pruning.html").read_text()
    assert '<a href="index.html#the-whole-method">' in (site / "pruning.html").read_text()
    assert '<a href="pruning.html">' in (site / "index.html").read_text()
    assert '<a href="LICENSE.txt">' in (site / "index.html").read_text()


@pytest.mark.parametrize("link", ["nothing.md", "data.md#nothing", "../prune/evolve.py", "../README.md#nothing"])
def test_a_link_that_leads_nowhere_fails_the_build(link, build_with):
    with pytest.raises(Abort, match="strict mode"):
        build_with(f"[there]({link})")
