"""Draw a file of requests, each with adapters of its own, on all processes of `accelerate launch`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image
from pydantic import ValidationError
from tqdm.auto import tqdm

from ..errors import SerialLoraError
from ..files.fingerprint import describe_base
from ..serving.batcher import Batcher, Policy
from ..serving.http import encode_png
from ..serving.jobs import Job
from ..serving.requests import Body, Request, sentence
from ..serving.server import make_batcher


def draw_requests(
    pipe: Any, file: Path, adapters: Path | None, output: Path, defaults: dict[str, Any], batch: int = 8
) -> list[Path]:
    """Draw every line of a JSON Lines file; line 1 becomes `00001.png`, whichever process draws it.

    A line is what `slora serve` takes: `{"prompt": ..., "adapters": {name: weight}, "seed": ..., ...}`. Without a seed
    it gets its line's number. An image that is there already, of the same request, base and adapters' content, is not
    drawn again.

    Args:
        pipe: The pipeline, on its device.
        file: The requests.
        adapters: Folder of adapters, by whose names the requests call them.
        output: Folder of the images.
        defaults: Fields of a request for lines that leave them out.
        batch: Requests of a batch at most.

    Returns:
        The images of this process.

    Raises:
        SerialLoraError: If a line is not a request, before anything is drawn; or if some could not be drawn, after all
            others have been.
    """
    bodies = [_body(file, number, line, defaults) for number, line in _lines(file)]
    batcher = make_batcher(pipe, adapters, policy=Policy(batch, 0.0, len(bodies) + 1, 1e9))
    wanted = {number: _request(batcher, file, number, body) for number, body in bodies}
    output.mkdir(parents=True, exist_ok=True)
    state = PartialState()
    # Requests of one schedule side by side, so that batches are full; dealt out evenly.
    order = sorted(wanted, key=lambda number: (repr(batcher.studio.key(wanted[number])), number))
    share = order[state.process_index :: state.num_processes]
    paths = {number: output / f"{number:05d}.png" for number in share}
    drawing = _Drawing(batcher, paths, state.is_local_main_process)
    failed = drawing.draw({number: wanted[number] for number in share})
    if failed:
        number, reason = next(iter(failed.items()))
        raise SerialLoraError(
            f"{len(failed)} of {len(share)} requests could not be drawn, the first in line {number} of {file}: "
            f"{reason} The others are in {output}; the same command draws those that are missing."
        )
    return [paths[number] for number in share]


class _Drawing:
    """Draws requests and writes them, each with what it was drawn from: the same request, adapters and base again."""

    def __init__(self, batcher: Batcher, paths: dict[int, Path], shown: bool) -> None:
        self.batcher, self.paths, self.shown = batcher, paths, shown
        self.base = _fingerprint(batcher.studio.pipe)

    def draw(self, requests: dict[int, Request]) -> dict[int, BaseException]:
        """Draw those that are not there yet; returns {line: why not}."""
        failed: dict[int, BaseException] = {}
        jobs: dict[int, tuple[Job, dict[str, Any]]] = {}
        for number, request in requests.items():
            try:
                sources = self._sources(request)
                if not _is_drawn(self.paths[number], request.described() | sources):
                    jobs[number] = self.batcher.submit(request), sources
            except (SerialLoraError, OSError) as error:
                failed[number] = error
        self.batcher.start()  # once all are there: every batch is as full as it can be
        try:
            for number, (job, sources) in tqdm(jobs.items(), unit="image", disable=not self.shown):
                if error := job.future.exception():
                    failed[number] = error
                else:
                    part = self.paths[number].with_suffix(".part")
                    part.write_bytes(encode_png(job, job.future.result(), **sources))
                    part.replace(self.paths[number])
        finally:
            for job, _ in jobs.values():
                job.cancel()  # of an interrupted run; the others have ended
            self.batcher.close()
        return failed

    def _sources(self, request: Request) -> dict[str, Any]:
        find = self.batcher.adapters.catalogue.find
        contents = {name: hashlib.sha256(find(name).read_bytes()).hexdigest() for name, _ in request.adapters}
        return {"base": self.base, "contents": contents}


def _fingerprint(pipe: Any) -> str | None:
    """The fingerprint of what draws, where it has a record."""
    try:
        return describe_base(getattr(pipe, "transformer", None) or pipe.unet).fingerprint
    except SerialLoraError:
        return None


def _lines(file: Path) -> list[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise SerialLoraError(f"--requests must be a file of JSON lines; {file} cannot be read: {error}.") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise SerialLoraError(f"--requests must hold one request a line; {file} is empty.")
    return lines


def _body(file: Path, number: int, line: str, defaults: dict[str, Any]) -> tuple[int, Body]:
    try:
        given = json.loads(line)
        if not isinstance(given, dict):
            raise SerialLoraError(f"must be a JSON object; got {line[:80]}.")
        return number, Body.model_validate({"seed": number, **defaults, **given})
    except ValidationError as error:
        reason = sentence(list(error.errors()))
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise SerialLoraError(f"Line {number} of {file}: {reason}")


def _request(batcher: Batcher, file: Path, number: int, body: Body) -> Request:
    try:
        return batcher.studio.request(body)
    except SerialLoraError as error:
        raise SerialLoraError(f"Line {number} of {file}: {error}") from error


def _is_drawn(path: Path, what: dict[str, Any]) -> bool:
    """Whether an image is there, whole, and says that it was drawn of the same."""
    try:
        with Image.open(path) as image:
            image.load()
            text: Any = getattr(image, "text", {})
            return json.loads(text.get("slora", "null")) == json.loads(json.dumps(what))
    except (OSError, ValueError):
        return False
