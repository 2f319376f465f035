"""The page of `slimstep compare --serve`: a prompt, and what every model makes of it."""

import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from slimstep.eval.evaluator import picture
from slimstep.eval.pages.videos import enlarged
from slimstep.eval.side_by_side import SideModel

HEAD = """# Side by side
The same prompt and the same noise for every model, one after the other. The first draw loads the models."""
HEIGHT = 440  # pixels of the page
FONTS = ["system-ui", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"]  # of the machine: the default's are fetched


def gradio() -> ModuleType:
    """The library, which is optional, set to ask nothing of the network: it may not be there."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    return import_module("gradio")


def comparison_page(models: Sequence[SideModel]) -> Any:
    """Gradio's Blocks with one column a model, the first the one that times are compared with."""
    gr = gradio()

    def draw(prompt: str, seed: float) -> Iterator[dict[Any, Any]]:
        if not prompt.strip():
            raise gr.Error("type a prompt first")
        first = None
        for model, shown in zip(models, pictures, strict=True):
            model.warm_up()
            image, seconds = model.draw(prompt, int(seed))
            first = first or seconds
            faster = "" if model is models[0] else f", {first / seconds:.1f} times as fast"
            label = f"{model.name}: {model.setting}, {1000 * seconds:.0f} ms{faster}"
            yield {shown: gr.update(value=enlarged(picture(image)), label=label)}

    with gr.Blocks(title="slimstep: side by side") as page:
        gr.Markdown(HEAD)
        with gr.Row():
            prompt = gr.Textbox(label="Prompt", scale=4, autofocus=True)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            button = gr.Button("Draw", variant="primary")
        with gr.Row():
            pictures = [
                gr.Image(label=f"{model.name}: {model.setting}", format="png", height=HEIGHT) for model in models
            ]
        gr.on([button.click, prompt.submit], draw, [prompt, seed], pictures)
    return page


def serve(models: Sequence[SideModel], port: int | None, is_waiting: bool = True) -> str:
    """Serves the page on this machine alone, until it is interrupted; its address. port: None for the first free one of
    Gradio's."""
    page, gr = comparison_page(models), gradio()
    theme = gr.themes.Default(font=FONTS, font_mono=["monospace"])
    _, address, _ = page.launch(
        server_name="127.0.0.1", server_port=port, prevent_thread_lock=not is_waiting, theme=theme, quiet=not is_waiting
    )
    return address
