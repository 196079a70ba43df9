"""A page to look at a run: `<output_dir>/index.html`, made of what the run writes down, and of nothing else.

Curves come from metrics.jsonl, pictures from `validation/`, settings from config.yaml, norms from the adapters that
were saved. Everything is in the one file, which asks for no other.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from PIL import Image

from ..convert.describe import block_norms, lora_norms
from ..convert.merge import scaled_pairs
from ..files.format import AdapterFile
from ..files.storage import LORA_NAMES, WEIGHT_NAME
from .charts import STYLE, Point, bar_chart, line_chart
from .checkpoint import checkpoints, step_of

PAGE, METRICS = "index.html", "metrics.jsonl"
EVERY = 5.0
"""Seconds between two pages at least; a page that takes t seconds to write also waits 100 t, so it costs 1% at most."""

MOST_PICTURES = 12
_PICTURE_WIDTH = 480
_GIB = 2**30

Pictures = Mapping[str, Mapping[int, Path]]
"""{name: {step: picture}}."""
Norms = dict[str, dict[str, float]]

# Of every step, in the order of the page: what it is called, its title, what divides it, and what its axis must reach.
_OF_STEPS: dict[str, tuple[str, float, tuple[float, ...]]] = {
    "loss": ("Loss", 1.0, ()),
    "lr": ("Learning rate", 1.0, (0.0,)),
    "grad_norm": ("Norm of the gradient", 1.0, ()),
    "seconds": ("Seconds of a step", 1.0, (0.0,)),
    "memory": ("Peak memory, GiB", _GIB, (0.0,)),
}


class Page:
    """Writes the page of a run, again and again.

    Args:
        folder: The run's folder.
        pictures: Tells which pictures are this run's.

    Attributes:
        about: What is said of the run at its start.
    """

    def __init__(self, folder: Path, pictures: Callable[[], Pictures]) -> None:
        self.folder, self._pictures = folder, pictures
        self.about: Mapping[str, str] = {}
        self._metrics = _Metrics(folder / METRICS)
        self._norms: dict[Path, tuple[tuple[int, int], Norms]] = {}
        self._inline: dict[Path, tuple[tuple[int, int], str]] = {}
        self._next = 0.0

    def refresh(self) -> None:
        """Write the page, unless the last one is too fresh."""
        if time.monotonic() >= self._next:
            self.write()

    def write(self, ended: bool = False) -> Path:
        """Write the page now; `ended` says that no step will follow."""
        began = time.monotonic()
        curves = self._metrics.read()
        path, half = self.folder / PAGE, self.folder / f".{PAGE}.tmp"
        half.write_text(self._html(curves, ended), encoding="utf-8")
        os.replace(half, path)
        done = time.monotonic()
        self._next = done + max(EVERY, 100 * (done - began))
        return path

    def _html(self, curves: Mapping[str, list[Point]], ended: bool) -> str:
        settings = _settings(self.folder / "config.yaml")
        step = int(max((points[-1][0] for points in curves.values()), default=0))
        steps = settings.get("max_train_steps")
        state = f"{'ended at' if ended else 'at'} step {step}{f' of {steps}' if steps else ''}"
        name = self.folder.resolve().name
        sections = [
            _charts(curves),
            self._pictures_html(),
            self._norms_html(step if ended else None),
            _table("Run", self.about),
            _table("Settings", {key: _shown(value) for key, value in settings.items()}),
        ]
        written = datetime.now().astimezone().isoformat(" ", "seconds")
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}: {state}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            + ("" if ended else '<meta http-equiv="refresh" content="30">\n')
            + f"<style>{_STYLE}</style></head><body>\n<h1>{escape(name)}</h1>\n"
            f"<p>{state}; written {written}{'' if ended else ', and again while it trains'}.</p>\n"
            + "\n".join(section for section in sections if section)
            + "\n</body></html>\n"
        )

    def _pictures_html(self) -> str:
        sections = []
        for name, found in self._pictures().items():
            figures = [
                f'<figure><a href="{quote(path.relative_to(self.folder).as_posix())}">'
                f'<img src="{self._once(self._inline, path, _inlined)}" alt="{escape(name)} at step {step}"></a>'
                f"<figcaption>step {step}</figcaption></figure>"
                for step, path in _spread(found)
            ]
            sections.append(f'<h2>{escape(name.capitalize())}</h2><div class="pictures">{"".join(figures)}</div>')
        return "".join(sections)

    def _norms_html(self, last: int | None) -> str:
        """The adapter's norms, of every checkpoint that is there and, where the run has ended, of the result."""
        folders = {step_of(folder): folder for folder in checkpoints(self.folder)}
        folders |= {} if last is None else {last: self.folder}
        names = (WEIGHT_NAME, *LORA_NAMES)
        files = [(s, f / name) for s, f in sorted(folders.items()) for name in names if (f / name).is_file()]
        norms = {s: self._once(self._norms, path, _norms_in) for s, path in files}
        if not norms:
            return ""
        whole = [(s, math.sqrt(sum(v * v for b in blocks.values() for v in b.values()))) for s, blocks in norms.items()]
        step, blocks = list(norms.items())[-1]
        return (
            "<h2>The adapter: ‖sBA‖</h2><div class=charts>"
            + _figure("All together, at each checkpoint", line_chart({"norm": whole}, "norm of the adapter"))
            + _figure(f"By block, at step {step}", bar_chart(blocks, "norms of the adapter by block"))
            + "</div>"
        )

    @staticmethod
    def _once(cache: dict[Path, tuple[tuple[int, int], Any]], path: Path, make: Callable[[Path], Any]) -> Any:
        """What is made of a file, made again only when the file has changed."""
        status = path.stat()
        key = (status.st_mtime_ns, status.st_size)
        if path not in cache or cache[path][0] != key:
            cache[path] = key, make(path)
        return cache[path][1]


class _Metrics:
    """The points of every number in metrics.jsonl; each call reads only what has been added."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self._curves: dict[str, list[Point]] = {}

    def read(self) -> Mapping[str, list[Point]]:
        if not self._path.exists():
            return self._curves
        with open(self._path, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):  # not all of it is written yet
                    break
                self._read += len(line)
                self._note(json.loads(line))
        return self._curves

    def _note(self, values: dict[str, Any]) -> None:
        step = values.pop("step")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._curves.setdefault(name, []).append((step, float(value)))


def _charts(curves: Mapping[str, list[Point]]) -> str:
    """One chart for each number; those of one prefix, such as `iou/`, share one."""
    grouped: dict[str, dict[str, list[Point]]] = {}
    for name, points in curves.items():
        group, _, rest = name.rpartition("/")
        grouped.setdefault(f"{group}/" if group else name, {})[rest] = points
    scores = [name for name in grouped if name not in _OF_STEPS and not name.endswith("/")]
    parts = []
    order = ["loss", *scores, *(name for name in grouped if name.endswith("/"))]
    for name in [*order, *(name for name in _OF_STEPS if name != "loss")]:
        if name not in grouped:
            continue
        title, unit, axis = _OF_STEPS.get(name, (name.strip("/").replace("_", " ").capitalize(), 1.0, ()))
        lines = {key: [(x, y / unit) for x, y in points] for key, points in grouped[name].items()}
        title = {"loss/": "Loss by timestep"}.get(name, title)
        smooth = name in ("loss", "loss/", "grad_norm") and max(map(len, lines.values())) > 40
        parts.append(_figure(f"{title}{_numbers(lines)}", line_chart(lines, title, smooth, axis)))
    return f'<div class="charts">{"".join(parts)}</div>' if parts else "<p>No step has been taken yet.</p>"


def _numbers(lines: Mapping[str, Sequence[Point]]) -> str:
    """The last value and the range of a single curve, in words."""
    values = [y for points in lines.values() for _, y in points if math.isfinite(y)]
    if len(lines) > 1 or not values:
        return ""
    return f": {values[-1]:.4g} (from {min(values):.4g} to {max(values):.4g})"


def _spread(found: Mapping[int, Path]) -> list[tuple[int, Path]]:
    """Some of the pictures: the first, the last and evenly spread ones between."""
    steps = list(found)
    count = min(MOST_PICTURES, len(steps))
    chosen = [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]
    return [(step, found[step]) for step in chosen if found[step].is_file()]


def _inlined(path: Path) -> str:
    """A picture as a data URI, scaled down if it is wide."""
    with Image.open(path) as picture:
        picture.load()
    kind, stream = "png", io.BytesIO()
    if picture.width > _PICTURE_WIDTH:
        kind, height = "jpeg", max(1, round(picture.height * _PICTURE_WIDTH / picture.width))
        picture = picture.convert("RGB").resize((_PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    picture.save(stream, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _norms_in(path: Path) -> Norms:
    """{block: {pair: ||s B A||}} of an adapter's file, over its components; of a LoRA's {block: {kind: norm}}."""
    if path.name in LORA_NAMES:
        return lora_norms(path)
    pairs = scaled_pairs(AdapterFile.read(path))
    several = len(pairs) > 1
    return {
        f"{component} {block}" if several else block: norms
        for component, places in pairs.items()
        for block, norms in block_norms(places).items()
    }


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def _table(title: str, rows: Mapping[str, str]) -> str:
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f"<h2>{title}</h2><table>{lines}</table>" if rows else ""


def _figure(caption: str, chart: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>"


_STYLE = re.sub(
    r"\s+",
    " ",
    """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --faint: #69707a; --line: #dfe3e8; --box: #f7f8fa }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e6e9ed; --faint: #9aa3ad; --line: #333a42; --box: #1c2126 } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1440px; padding: 1rem 1.5rem 3rem }
h1 { font-size: 1.5rem; margin: 0 } h1 + p { color: var(--faint); margin-top: 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)) }
figure { background: var(--box); border: 1px solid var(--line); border-radius: 8px; margin: 0; padding: .7rem }
figcaption { font-size: .9rem; font-weight: 600; padding-bottom: .3rem }
.pictures { display: flex; flex-wrap: wrap; gap: .7rem } .pictures img { display: block; max-width: 480px; width: 100% }
.pictures figure { display: flex; flex-direction: column-reverse; padding: .5rem; max-width: 480px }
table { border-collapse: collapse; font-size: .9rem }
td, th { border-bottom: 1px solid var(--line); overflow-wrap: anywhere; padding: .25rem .9rem .25rem 0;
  text-align: left; vertical-align: top } th { color: var(--faint); font-weight: 500; white-space: nowrap }
"""
    + STYLE,
).strip()
