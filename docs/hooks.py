"""Hooks of mkdocs: the site also holds the README and some files beside it, and its links lead to where they are there.

A link is written as GitHub follows it, from file to file of the repository. `make docs` fails where one leads to a file
that the site does not hold: name such a file without a link (`prune/evolve.py`), or add it to OUTSIDE.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "benchmarks/README.md": "measurements.md",
    "LICENSE": "LICENSE.txt",
    "CITATION.cff": "CITATION.cff.txt",
}
LINK = re.compile(r"(?<=\]\()(?!\w+://)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with every link as a path within the site."""
    source = next((s for s, target in OUTSIDE.items() if target == page.file.src_uri), f"docs/{page.file.src_uri}")
    here, there = posixpath.dirname(source), posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match) -> str:
        file = posixpath.normpath(posixpath.join(here, link[1]))
        return posixpath.relpath(OUTSIDE.get(file, file.removeprefix("docs/")), there or ".")

    return LINK.sub(moved, markdown)
