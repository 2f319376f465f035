"""Pages from templates, with pictures inside."""

import base64
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from slimstep.engine.files import write_text
from slimstep.eval.pages.cautions import cautions
from slimstep.eval.pages.figures import save_figures, themed
from slimstep.eval.pages.runs import finite
from slimstep.eval.pages.text import count, decimals, digits, fixed, percent, signed
from slimstep.eval.pages.videos import Videos, as_shown, videos_of
from slimstep.eval.record import read_evaluation


def write_page(
    folder: Path,
    template: str,
    figures: Mapping[str, Figure],
    track: Callable[[], None] = lambda: None,
    saved_alone: Sequence[str] = (),
    **values: Any,
) -> Path:
    """Makes `folder`/report/*.png and `folder`/report.html anew, with the run's own name, cautions and videos.

    `track` is called when the pictures are there; the page, which says that all is done, comes last. Figures of
    `saved_alone` are not on the page.
    """
    save_figures(folder / "report", figures)
    track()
    drawn = {name: Markup(themed(figure, name)) for name, figure in figures.items() if name not in saved_alone}
    videos = videos_of(folder, read_evaluation(folder))
    own = {"name": folder.name, "cautions": cautions(folder), "figures": drawn, "videos": videos}
    write_text(folder / "report.html", render(template, **{**own, **values}))
    return folder / "report.html"


def render(template: str, cautions: Sequence[str] = (), videos: Videos | None = None, **values: Any) -> str:
    """A page from eval/pages/templates, cautions at its head, videos at its end; text is escaped, figures are not."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"digits": or_dash(digits), "signed": or_dash(signed), "count": count, "percent": percent,
                            "fixed": fixed, "decimals": decimals}  # fmt: skip
    return environment.get_template(template).render(cautions=cautions, videos=videos, **values)


def or_dash(form):
    """`form`, with a dash for what was not measured."""
    return lambda value, *more: form(value, *more) if finite(value) else "–"


@dataclass(frozen=True)
class Pair:
    """A picture of a prompt by each of two models, from the same noise: their names, and the pictures as data URIs."""

    prompt: str
    names: tuple[str, str]
    uris: tuple[str, str]


def pairs(pictures: Mapping[str, Sequence[Path]], prompts: Sequence[str] = (), most: int | None = None) -> list[Pair]:
    """The first pictures of two models beside each other; none where there are not two models, one kept none, or they
    are rows of the frames of videos, which a page shows as such. Those without a prompt have a number."""
    if len(pictures) != 2 or any(map(is_of_video, itertools.chain(*pictures.values()))):
        return []
    files = list(itertools.islice(zip(*pictures.values(), strict=False), most))
    titles = [*prompts, *(f"image {number}" for number in range(len(prompts) + 1, len(files) + 1))]
    first, second = pictures
    return [Pair(title, (first, second), (data_uri(one), data_uri(other)))
            for title, (one, other) in zip(titles, files, strict=False)]  # fmt: skip


def is_of_video(picture: Path) -> bool:
    """Whether it is a row of frames of a video, which lies beside it."""
    return picture.with_suffix(".webp").exists()


def data_uri(path: Path) -> str:
    """A PNG for an `<img>`, about as large as the page shows it."""
    file = io.BytesIO()
    as_shown(Image.open(path)).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
