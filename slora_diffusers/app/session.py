"""A pipeline, the adapters that are opened in it, and the pictures that it draws: base, live and fused."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ValidationError

from ..adapters.contexts import serial_lora_scale
from ..adapters.fuse import fuse_serial_lora, unfuse_serial_lora
from ..adapters.lifecycle import delete_serial_lora, set_serial_lora
from ..config import block_index
from ..convert.compress import compress_lora
from ..convert.describe import block_norms
from ..convert.export import export_lora
from ..convert.lowrank import LowRank, Products
from ..convert.merge import merge_serial_lora
from ..core.components import adapted, is_pipeline
from ..core.names import split_place
from ..core.state import pairs_of
from ..errors import SerialLoraError
from ..files.load import load_serial_lora
from ..files.save import save_serial_lora
from ..serving.requests import Body, Request, sentence
from ..serving.studio import Studio

OnStep = Callable[[int, int], None]
"""Called with the steps done and all steps; what it raises ends the drawing."""


class Stopped(SerialLoraError):
    """The drawing was stopped on request."""


@dataclass(frozen=True)
class Look:
    """How adapters act: `x~ = x + scale sum_i w_i s_i B_i A_i x`, at the blocks that are not off.

    Args:
        weights: {name: w_i}; an empty one is the base.
        scale: Factor on all of them.
        off: Blocks where no adapter acts, as `Session.blocks` names them.
    """

    weights: Mapping[str, float]
    scale: float = 1.0
    off: Collection[str] = ()


@dataclass(frozen=True)
class Versus:
    """The same noise drawn three ways.

    Args:
        base: Without adapters.
        live: With them.
        fused: With them in the weights.
        effect: Largest difference of a pixel between base and live, of 255.
        apart: The same between live and fused.
    """

    base: Image.Image
    live: Image.Image
    fused: Image.Image
    effect: int
    apart: int


class Session:
    """A pipeline to look at. One drawing at a time; whatever ends it, the pipeline is as before.

    Args:
        pipe: A pipeline that draws images of prompts or classes.

    Raises:
        SerialLoraError: If it needs more than that.
    """

    def __init__(self, pipe: Any) -> None:
        if not is_pipeline(pipe):
            raise SerialLoraError(f"Pictures need a whole pipeline; a {type(pipe).__name__} is a model alone.")
        self.pipe, self.studio = pipe, Studio(pipe)
        self.names: list[str] = []
        self.stop = threading.Event()
        self._busy = threading.Lock()

    @property
    def draws_classes(self) -> bool:
        """Whether pictures are of classes, and not of prompts."""
        return self.studio.subject == "class_labels"

    def subjects(self) -> list[str]:
        """What can be drawn where that is a class: names, or numbers where classes have none; else nothing."""
        if not self.draws_classes:
            return []
        names: dict[str, int] = getattr(self.pipe, "labels", None) or {}
        count = self.pipe.transformer.config.num_embeds_ada_norm
        return sorted(names, key=lambda name: names[name]) or [str(number) for number in range(count)]

    def open(self, source: str, name: str | None = None) -> str:
        """Open an adapter's file, folder or Hub id; returns its name here.

        Raises:
            SerialLoraError: If it cannot be read or does not fit; nothing has changed then.
        """
        if not source.strip():
            raise SerialLoraError("Give an adapter: a file, a folder or a Hub id.")
        with self._alone():
            name = name or self._free_name(_name_of(source.strip()))
            load_serial_lora(self.pipe, source.strip(), name)
            self.names.append(name)
        return name

    def close(self, name: str) -> None:
        """Forget an adapter."""
        with self._alone():
            delete_serial_lora(self.pipe, name)
            self.names.remove(name)

    def blocks(self) -> list[str]:
        """Blocks that have adapters, in order: `<component> <number>`, or `<component>` for sites outside of any."""
        return list(dict.fromkeys(_block(component, path) for component, path in self._sites(self.names)))

    def request(self, subject: str, seed: int = 0, steps: int | None = None, guidance: float | None = None) -> Request:
        """What to draw; what is left out is the pipeline's own.

        Args:
            subject: A prompt; or the name or number of a class.
            seed: Seed of the noise.
            steps: Sampling steps.
            guidance: Guidance scale.

        Raises:
            SerialLoraError: If the pipeline cannot draw that.
        """
        subject = subject.strip()
        if not subject:
            raise SerialLoraError(f"Say what to draw: a {'class' if self.draws_classes else 'prompt'}.")
        what: dict[str, Any] = {"prompt": subject}
        if self.draws_classes:
            known = getattr(self.pipe, "labels", None) or {}
            what = {"class": int(subject) if subject.isdecimal() and subject not in known else subject}
        try:
            body = Body.model_validate({**what, "seed": seed, "steps": steps, "guidance": guidance})
        except ValidationError as error:
            raise SerialLoraError(sentence(list(error.errors()))) from error
        return self.studio.request(body)

    def draw(self, wanted: Sequence[tuple[Request, Look]], on_step: OnStep | None = None) -> list[Image.Image]:
        """Pictures, with the adapters live, one after the other.

        Raises:
            SerialLoraError: If a weight is none, or a picture is not finite; `Stopped` after `stop` was set.
        """
        images = []
        with self._alone():
            for number, (request, look) in enumerate(wanted):
                self._activate(look)
                images.append(self._live(request, look, _part(on_step, number, len(wanted))))
        return images

    def versus(self, request: Request, look: Look, on_step: OnStep | None = None) -> Versus:
        """Base, live and fused from one seed."""
        with self._alone():
            self._activate(look)
            base = self._live(request, Look({}), _part(on_step, 0, 3))
            live = self._live(request, look, _part(on_step, 1, 3))
            with self._fused(look):
                fused = self._picture(request, _part(on_step, 2, 3))
        return Versus(base, live, fused, _difference(base, live), _difference(live, fused))

    def norms(self, name: str) -> dict[str, dict[str, float]]:
        """{block: {pair: ||s B A||_F}} of one adapter."""
        found: dict[str, dict[str, float]] = {}
        for component, pairs in self._products(name).items():
            found |= {f"{component} {block}": norms for block, norms in block_norms(pairs).items()}
        return found

    def spectra(self, name: str) -> dict[str, list[float]]:
        """{place: singular values of s B A} of one adapter."""
        return {
            f"{component}.{' '.join(split_place(key))}": part.singular_values()[: part.rank].tolist()
            for component, pairs in self._products(name).items()
            for key, part in pairs.items()
        }

    def export(self, look: Look, folder: str, format: str = "diffusers", rank: int | str | None = None) -> str:
        """Write the LoRA that equals what is shown; returns what was written, with its error."""
        path = _new_folder(folder)
        with self._alone():
            names, weights = self._shown(look, "export")
            report = export_lora(self.pipe, path, names, format, weights=weights, rank=rank)
        return "\n".join([str(report), *map(str, report.files), *report.load])

    def compress(self, lora: str, folder: str, rank: int) -> tuple[str, str]:
        """Turn a LoRA into a Serial LoRA, write it and open it; returns its name here and the report."""
        path = _new_folder(folder)
        if not lora.strip():
            raise SerialLoraError("Give a LoRA: a file, a folder or a Hub id.")
        with self._alone():
            name = self._free_name(path.name)
            report = compress_lora(self.pipe, lora.strip(), rank, adapter_name=name)
            self.names.append(name)
            file = save_serial_lora(self.pipe, path, name)
        return name, f"{report}\n{file}"

    def merge(self, look: Look, folder: str, rank: int | str | None = None) -> tuple[str, str]:
        """Add up what is shown into one adapter, write it and open it; returns its name here and the report."""
        path = _new_folder(folder)
        with self._alone():
            name = self._free_name(path.name)
            names, weights = self._shown(look, "merge")
            report = merge_serial_lora(self.pipe, names, weights, name, rank)
            self.names.append(name)
            file = save_serial_lora(self.pipe, path, name)
        return name, f"{report}\n{file}"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thing at a time."""
        with self._busy:
            yield

    def _activate(self, look: Look) -> None:
        """Give the adapters their weights; the scale is a matter of each picture."""
        unknown = [name for name in look.weights if name not in self.names]
        if unknown:
            raise SerialLoraError(f"No adapter {unknown[0]!r} is open; these are: {', '.join(self.names) or 'none'}.")
        if self.names:
            set_serial_lora(self.pipe, list(look.weights), [self._weight(name, look) for name in look.weights])

    def _live(self, request: Request, look: Look, on_step: OnStep | None) -> Image.Image:
        scale = look.scale if look.weights else 0.0
        with serial_lora_scale(self.pipe, scale) if self.names else nullcontext():
            return self._picture(request, on_step)

    @contextmanager
    def _fused(self, look: Look) -> Iterator[None]:
        """Inside, what is active is in the weights."""
        if not look.weights:
            yield
            return
        fuse_serial_lora(self.pipe, scale=look.scale)
        try:
            yield
        finally:
            unfuse_serial_lora(self.pipe)

    def _shown(self, look: Look, what: str) -> tuple[list[str], list[Any]]:
        """The adapters that are shown and their weights, the scale in them."""
        if not look.weights:
            raise SerialLoraError(f"There is nothing to {what}: open an adapter first.")
        self._activate(look)
        return list(look.weights), [self._weight(name, look, look.scale) for name in look.weights]

    def _weight(self, name: str, look: Look, factor: float = 1.0) -> Any:
        """What `set_serial_lora` takes: a number, or {component: {site: number}} where blocks are off."""
        weight = factor * look.weights[name]
        if not look.off:
            return weight
        places: dict[str, dict[str, float]] = {}
        for component, path in self._sites([name]):
            at = 0.0 if _block(component, path) in look.off else weight
            places.setdefault(component, {})[re.escape(path)] = at
        return places

    def _sites(self, names: Collection[str]) -> list[tuple[str, str]]:
        """(component, path) of every site that these adapters sit on."""
        found = [
            (component, split_place(key)[0])
            for component, model in adapted(self.pipe, required=False).items()
            for key, pair in pairs_of(model).items()
            if any(name in pair.scaling for name in names)
        ]
        return list(dict.fromkeys(found))

    def _products(self, name: str) -> Products:
        if name not in self.names:
            raise SerialLoraError(f"No adapter {name!r} is open; these are: {', '.join(self.names) or 'none'}.")
        found: Products = {}
        for component, model in adapted(self.pipe).items():
            for key, pair in pairs_of(model).items():
                if name in pair.scaling:
                    A, B = (matrix.detach().float().cpu() for matrix in pair.matrices(name))
                    found.setdefault(component, {})[key] = LowRank(A, B * pair.scaling[name])
        return found

    def _picture(self, request: Request, on_step: OnStep | None) -> Image.Image:
        def watch(done: int, steps: int) -> None:
            if self.stop.is_set():
                self.stop.clear()
                raise Stopped("Stopped.")
            if on_step is not None:
                on_step(done, steps)

        (picture,) = self.studio.draw([request], on_step=watch)
        if isinstance(picture, SerialLoraError):
            raise picture
        return picture.image

    def _free_name(self, wanted: str) -> str:
        wanted = re.sub(r"[^\w-]+", "_", wanted).strip("_-") or "adapter"
        numbered = (f"{wanted}_{n}" for n in range(2, len(self.names) + 3))
        return wanted if wanted not in self.names else next(n for n in numbered if n not in self.names)


def _name_of(source: str) -> str:
    path = Path(source)
    return path.parent.name if path.stem == "serial_lora_weights" and path.parent.name else path.stem or path.name


def _block(component: str, path: str) -> str:
    number = block_index(path)
    return component if number is None else f"{component} {number}"


def _part(on_step: OnStep | None, number: int, parts: int) -> OnStep | None:
    """Progress of one of several pictures."""
    return None if on_step is None else lambda done, steps: on_step(number * steps + done, parts * steps)


def _difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())


def _new_folder(folder: str) -> Path:
    """A folder to write to, which is new or empty."""
    if not folder.strip():
        raise SerialLoraError("Give a folder to write to.")
    path = Path(folder.strip()).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SerialLoraError(f"{path} is there already: nothing is overwritten. Give a new folder.")
    return path
