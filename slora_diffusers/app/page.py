"""The page of `slora app`: what can be seen and pressed. What it does is `session` and `grid`."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..convert.plots import plot_spectra
from ..errors import SerialLoraError
from ..training.charts import STYLE, bar_chart
from .grid import Grid, by_adapters, by_weights, columns_of, draw_grid
from .session import Look, Session

STEPS = 20
BAR_EVERY = 0.25
"""Seconds between two states of the progress bar."""
_CSS = ".gradio-container { max-width: 1280px !important } .error { white-space: normal }"


def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a handler raises is shown as one sentence, and printed nowhere."""

    @functools.wraps(function)
    def handled(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except SerialLoraError as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise gr.Error(f"{type(error).__name__}: {' '.join(str(error).split())}", print_exception=False) from error

    return handled


class Desk:
    """What one page works on, and what its buttons do.

    Args:
        open_base: From the name of a base to its session.
        base: The base to begin with.
        adapters: Adapters to begin with.

    Raises:
        SerialLoraError: If one of them cannot be opened.
    """

    def __init__(self, open_base: Callable[[str], Session], base: str, adapters: Sequence[str]) -> None:
        self._open_base, self.base = open_base, base
        self.session = open_base(base)
        for adapter in adapters:
            self.session.open(adapter)

    def change_base(self, base: str) -> dict[str, float]:
        """Another base, without adapters; returns the weights of none."""
        if not base.strip():
            raise SerialLoraError("Give a base: a folder, a Hub id, or demo.")
        self.session, self.base = self._open_base(base.strip()), base.strip()
        return {}

    def open(self, source: str, weights: dict[str, float]) -> dict[str, float]:
        """One more adapter, at weight 1."""
        return {**weights, self.session.open(source): 1.0}

    def close(self, name: str, weights: dict[str, float]) -> dict[str, float]:
        """Without an adapter."""
        self.session.close(name)
        return {other: weight for other, weight in weights.items() if other != name}

    def versus(self, what: Sequence[Any], look: Look, progress: Any) -> tuple[Any, Any, Any, str]:
        """Base, live and fused, and what differs, in words."""
        drawn = self.session.versus(self.session.request(*what), look, _steps(progress))
        said = (
            f"Base and live differ by up to {drawn.effect} of 255 in a pixel; live and fused by up to {drawn.apart}. "
            f"Seed {what[1]}."
        )
        return _enlarged(drawn.base), _enlarged(drawn.live), _enlarged(drawn.fused), said

    def grid(self, rows: str, weights: str, subjects: str, seeds: str, what: Sequence[Any], look: Look,
             progress: Any) -> Any:  # fmt: skip
        """A grid of weights or adapters against subjects and seeds."""
        _, _, steps, guidance = what
        lines = by_adapters(look) if rows == "adapters" else by_weights(look, numbers(weights, float, "Weights"))
        drawn = [part.strip() for part in subjects.splitlines() if part.strip()] or [what[0]]
        columns = columns_of(self.session, drawn, numbers(seeds, int, "Seeds"), steps, guidance)
        return draw_grid(self.session, Grid(lines, columns), ", ".join(look.weights), _steps(progress))

    def plots(self, name: str) -> tuple[str, str]:
        """A picture of an adapter's spectrum, and a chart of its norms."""
        if not name:
            raise SerialLoraError("Choose an adapter: open one first.")
        folder = Path(tempfile.mkdtemp(prefix="slora-"))
        plot_spectra(self.session.spectra(name), folder / "spectrum.png", f"Singular values of {name}")
        title = f"Norms of {name}, by block"
        chart = bar_chart(self.session.norms(name), title)
        return str(folder / "spectrum.png"), f"<style>{STYLE}</style><h3>{escape(title)}</h3>{chart}"


def numbers(text: str, kind: type, what: str) -> list[Any]:
    """Numbers between commas or spaces.

    Raises:
        SerialLoraError: If one is none.
    """
    parts = text.replace(",", " ").split()
    try:
        found = [kind(part) for part in parts]
    except ValueError:
        found = []
    if not found:
        raise SerialLoraError(f"{what} are numbers between commas, such as 0, 1, 2; got {text!r}.")
    return found


def rank_of(text: str) -> int | str | None:
    """A rank, `auto`, or nothing for exact.

    Raises:
        SerialLoraError: If it is none of them.
    """
    text = text.strip()
    if text in ("", "auto"):
        return text or None
    return numbers(text, int, "Ranks")[0]


def _steps(progress: Any) -> Callable[[int, int], None]:
    """What shows the steps that are done, not each of them: a browser that draws too many bars answers no button."""
    shown = 0.0

    def show(done: int, steps: int) -> None:
        nonlocal shown
        if done == steps or time.monotonic() - shown >= BAR_EVERY:
            shown = time.monotonic()
            progress((done, steps), desc="Drawing", unit="steps")

    return show


def _enlarged(image: Any) -> Any:
    """A small picture as large as can be seen; others as they are."""
    factor = max(1, 256 // max(image.size))
    return image.resize((image.width * factor, image.height * factor)) if factor > 1 else image


def build(desk: Desk) -> gr.Blocks:
    """The page of a desk."""
    with gr.Blocks(title="slora", analytics_enabled=False) as page:
        gr.Markdown("# Serial LoRA\nOpen adapters, move their weights, and see base, live and fused from one seed.")
        weights = gr.State(dict.fromkeys(desk.session.names, 1.0))
        with gr.Row():
            base = gr.Textbox(desk.base, label="Base: demo, a folder or a Hub id", scale=3)
            change = gr.Button("Open base")
            source = gr.Textbox(label="Adapter: a folder, a file or a Hub id", scale=3)
            add = gr.Button("Open adapter", variant="primary")
        with gr.Row():
            with gr.Column(scale=1):
                _weight_sliders(desk, weights)
                scale = gr.Slider(-2, 2, 1, step=0.05, label="Global scale")
                on = gr.CheckboxGroup(desk.session.blocks(), value=desk.session.blocks(), label="Blocks that are on")
            with gr.Column(scale=1):
                subject = _subject(desk)
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0)
                    steps = gr.Slider(1, 150, STEPS, step=1, label="Steps")
                    guidance = gr.Textbox(label="Guidance (empty: the pipeline's)")
        controls = [weights, scale, on, subject, seed, steps, guidance]
        _tabs(desk, controls, weights)

        def blocks(_: Any) -> Any:
            names = desk.session.blocks()
            return gr.update(choices=names, value=names)

        change.click(plainly(desk.change_base), base, weights, api_visibility="private").then(
            lambda: _subject_update(desk), None, subject
        )
        add.click(plainly(desk.open), [source, weights], weights, api_visibility="private")
        weights.change(blocks, weights, on, api_visibility="private")
    return page.queue()


def _weight_sliders(desk: Desk, weights: gr.State) -> None:
    """A slider and a button to close for each adapter, however many."""
    names = gr.State(list(desk.session.names))
    weights.change(lambda now: list(now), weights, names, api_visibility="private")

    @gr.render(inputs=[names, weights], triggers=[names.change])
    def show(now: list[str], held: dict[str, float]) -> None:
        if not now:
            gr.Markdown("*No adapter is open yet.*")
        for name in now:
            with gr.Row():
                slider = gr.Slider(
                    -2,
                    2,
                    held.get(name, 1.0),
                    step=0.05,
                    label=f"Weight of {name}",
                    scale=4,
                    key=name,
                    interactive=True,
                )
                close = gr.Button("Close", scale=1, min_width=60)
            slider.change(lambda value, all_, name=name: {**all_, name: value}, [slider, weights], weights)
            close.click(plainly(functools.partial(desk.close, name)), weights, weights)


def _subject(desk: Desk) -> gr.Dropdown:
    return gr.Dropdown(label="What to draw: a prompt, or a class", allow_custom_value=True, **_subjects(desk))


def _subjects(desk: Desk) -> dict[str, Any]:
    choices = desk.session.subjects()
    return {"choices": choices, "value": choices[0] if choices else "a photo of a cat"}


def _subject_update(desk: Desk) -> Any:
    return gr.update(**_subjects(desk))


def _look(desk: Desk, weights: dict[str, float], scale: float, on: Sequence[str]) -> Look:
    return Look(weights, scale, [block for block in desk.session.blocks() if block not in on])


def _tabs(desk: Desk, controls: list[Any], weights: gr.State) -> None:
    with gr.Tab("Side by side"):
        with gr.Row():
            draw = gr.Button("Draw", variant="primary")
            cancel = gr.Button("Cancel")
        with gr.Row():
            shown = [_picture(label) for label in ("Base", "Live", "Fused")]
        said = gr.Markdown(elem_id="said")
    with gr.Tab("Grid"):
        with gr.Row():
            rows = gr.Radio(["weights", "adapters"], value="weights", label="Rows")
            factors = gr.Textbox("0, 0.5, 1", label="Weights of the rows")
            seeds = gr.Textbox("0, 1, 2", label="Seeds of the columns")
            subjects = gr.Textbox(lines=2, label="Prompts or classes of the columns, one a line (empty: as above)")
        with gr.Row():
            make = gr.Button("Draw the grid", variant="primary")
            cancel_grid = gr.Button("Cancel the grid")
        sheet = _picture("Grid", format="png")
    with gr.Tab("Inspect"):
        adapter = gr.Dropdown(desk.session.names, label="Adapter to inspect")
        inspect = gr.Button("Plot spectrum and norms")
        with gr.Row():
            plots = [_picture("Spectrum of s B A", show_label=False), gr.HTML(label="Norms by block")]
        weights.change(lambda now: gr.update(choices=list(now), value=next(iter(now), None)), weights, adapter)
    _convert_tab(desk, controls, weights)

    def look(values: Sequence[Any]) -> tuple[list[Any], Look]:
        held, scale, on, subject, seed, steps, guidance = values
        scale_of = numbers(guidance, float, "Guidance scales")[0] if guidance.strip() else None
        return [subject, seed, steps, scale_of], _look(desk, held, scale, on)

    @plainly
    def draw_all(*values: Any, progress: Any = gr.Progress()) -> Any:  # noqa: B008 (gradio finds it there)
        return desk.versus(*look(values), progress)

    @plainly
    def draw_sheet(rows: str, factors: str, subjects: str, seeds: str, *values: Any,
                   progress: Any = gr.Progress()) -> Any:  # noqa: B008  # fmt: skip
        return desk.grid(rows, factors, subjects, seeds, *look(values), progress)

    def begin(button: gr.Button) -> Any:
        """A press of Cancel before this one is void; one after it counts, also while the drawing still waits."""
        return button.click(lambda: desk.session.stop.clear(), queue=False)

    begin(draw).then(draw_all, controls, [*shown, said])
    begin(make).then(draw_sheet, [rows, factors, subjects, seeds, *controls], sheet)
    for button in (cancel, cancel_grid):
        button.click(lambda: desk.session.stop.set(), queue=False)
    inspect.click(plainly(desk.plots), adapter, plots)


def _picture(label: str, **more: Any) -> gr.Image:
    """A place for a picture; without the button that would send it to the Hub."""
    return gr.Image(label=label, alt_text=label, interactive=False, buttons=["download", "fullscreen"], **more)


def _convert_tab(desk: Desk, controls: list[Any], weights: gr.State) -> None:
    with gr.Tab("Export, compress, merge"):
        with gr.Row():
            folder = gr.Textbox(label="Folder to write to (a new one)", scale=2)
            rank = gr.Textbox(label="Rank (empty: exact; auto: the least that is as good)")
            form = gr.Dropdown(["diffusers", "peft", "kohya"], value="diffusers", label="Format of the LoRA")
            lora = gr.Textbox(label="LoRA to compress: a file, a folder or a Hub id", scale=2)
        with gr.Row():
            export, merge = gr.Button("Export what is shown as a LoRA"), gr.Button("Merge what is shown")
            compress = gr.Button("Compress the LoRA")
        report = gr.Textbox(label="Report", lines=4, interactive=False)
    held = controls[:3]

    def exported(folder: str, form: str, rank: str, *shown: Any) -> str:
        return desk.session.export(_look(desk, *shown), folder, form, rank_of(rank))

    def merged(folder: str, rank: str, *shown: Any) -> tuple[str, dict[str, float]]:
        name, said = desk.session.merge(_look(desk, *shown), folder, rank_of(rank))
        return said, {**shown[0], name: 0.0}  # beside those that it sums, it would count twice

    def compressed(lora: str, folder: str, rank: str, held: dict[str, float]) -> tuple[str, dict[str, float]]:
        wanted = rank_of(rank)
        if not isinstance(wanted, int):
            raise SerialLoraError(f"Compressing needs a rank, a whole number of at least 1; got {rank!r}.")
        name, said = desk.session.compress(lora, folder, wanted)
        return said, {**held, name: 1.0}

    export.click(plainly(exported), [folder, form, rank, *held], report)
    merge.click(plainly(merged), [folder, rank, *held], [report, weights])
    compress.click(plainly(compressed), [lora, folder, rank, weights], [report, weights])


def serve(open_base: Callable[[str], Session], base: str, adapters: Sequence[str], host: str, port: int) -> None:
    """Show the page until it is interrupted."""
    launch(build(Desk(open_base, base, adapters)), host, port)


def launch(page: gr.Blocks, host: str, port: int, wait: bool = True) -> str:
    """Start the page, with fonts of the system alone; returns its address."""
    plain = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, address, _ = page.launch(
        server_name=host, server_port=port or None, quiet=True, theme=plain, css=_CSS, footer_links=[],
        prevent_thread_lock=not wait, share=False,
    )  # fmt: skip
    return address
