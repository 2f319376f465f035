"""The import root: `slimstep.prune`, `slimstep.eval` and the other folders, in a checkout and in an installed copy.

A checkout keeps the folders beside this one, an installed copy within it (pyproject.toml).
"""

from pathlib import Path

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parent  # of the folders: prune, configs, assets …
if not (ROOT / "engine").is_dir():
    ROOT = ROOT.parent
    __path__.append(str(ROOT))
