"""Pages from templates, with pictures inside."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from slimstep.eval.pages.runs import finite
from slimstep.eval.pages.text import count, digits, percent, signed

PICTURE = 256  # pixels on the page: larger images are scaled down, smaller ones have their pixels repeated


def render(template: str, cautions: Sequence[str] = (), **values: Any) -> str:
    """A page from eval/pages/templates, cautions at its head; text is escaped, figures are not."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"digits": or_dash(digits), "signed": or_dash(signed), "count": count, "percent": percent}
    return environment.get_template(template).render(cautions=cautions, **values)


def or_dash(form):
    """`form`, with a dash for what was not measured."""
    return lambda value: form(value) if finite(value) else "–"


def data_uri(path: Path) -> str:
    """A PNG for an `<img>`, about as large as the page shows it."""
    image = Image.open(path).convert("RGB")
    image = image.resize([side * max(1, PICTURE // max(image.size)) for side in image.size], Image.Resampling.NEAREST)
    image.thumbnail((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
