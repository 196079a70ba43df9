"""The adapters of a server: found by name in one folder or an allow-list of the Hub, held by least recent use."""

from __future__ import annotations

import hashlib
import re
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SerialLoraError
from ..files.format import AdapterFile
from ..files.storage import WEIGHT_NAME, find_file
from .errors import NoRoom, RequestError, UnknownAdapter

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")
_TRUSTED = 2.0
"""Seconds after which a file's time stamps tell whether it changed: a second write within a clock's tick keeps them."""
_LONGEST_HEADER = 1 << 24
_HUB_SECONDS = 300.0
"""Seconds until the Hub is asked again for the file of a revision."""


@dataclass(frozen=True)
class Stamp:
    """What the file system says of a file; `trusted` unless it was written a moment ago."""

    values: tuple[int, ...]
    trusted: bool

    @staticmethod
    def of(path: Path) -> Stamp:
        """The stamp of a file."""
        s = path.stat()
        age = time.time() - max(s.st_mtime, s.st_ctime)
        return Stamp((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns), not 0 <= age < _TRUSTED)


@dataclass(frozen=True)
class Held:
    """An adapter that is loaded: its name in the model, its bytes there, and what its load warned of."""

    name: str
    bytes: int
    warnings: tuple[str, ...]


class Catalogue:
    """Where adapters come from: `NAME/serial_lora_weights.safetensors` or `NAME.safetensors` in a folder, and the Hub.

    Args:
        folder: The folder, or None. A name never leads out of it, not through a link either.
        hub: Ids of the Hub that may be used, `user/name` or `user/name@revision`.

    Raises:
        SerialLoraError: If there is no such folder.
    """

    def __init__(self, folder: Path | None = None, hub: Sequence[str] = ()) -> None:
        if folder is not None and not folder.is_dir():
            raise SerialLoraError(f"The folder of adapters, {folder}, does not exist or is not a folder.")
        self.folder = None if folder is None else folder.resolve()
        self.hub = {name: (name.partition("@")[0], name.partition("@")[2] or None) for name in hub}
        self._fetched: dict[str, tuple[float, Path]] = {}

    def names(self) -> list[str]:
        """Every name that a request may use."""
        found = list(self.hub)
        for path in [] if self.folder is None else sorted(self.folder.rglob("*.safetensors")):
            inside = path.relative_to(self.folder)  # pyright: ignore[reportArgumentType]
            found.append((inside.parent if inside.name == WEIGHT_NAME else inside.with_suffix("")).as_posix())
        return [name for name in dict.fromkeys(found) if name in self.hub or self._in_folder(name) is not None]

    def check(self, name: str) -> None:
        """Raise UnknownAdapter unless there is an adapter of that name; the Hub is not asked."""
        if name not in self.hub and self._in_folder(name) is None:
            raise UnknownAdapter(f"There is no adapter {name!r} here; GET /adapters lists those that there are.")

    def find(self, name: str) -> Path:
        """The local file of an adapter, fetched from the Hub where it comes from there."""
        self.check(name)
        if name not in self.hub:
            path = self._in_folder(name)
            assert path is not None
            return path
        fetched, path = self._fetched.get(name, (0.0, None))
        if path is None or time.monotonic() - fetched > _HUB_SECONDS:
            repository, revision = self.hub[name]
            path = find_file(repository, revision=revision)
            self._fetched[name] = time.monotonic(), path
        return path

    def _in_folder(self, name: str) -> Path | None:
        if self.folder is None or len(name) > 255 or not _NAME.fullmatch(name):
            return None
        for path in (self.folder / name / WEIGHT_NAME, self.folder / f"{name}.safetensors"):
            real = path.resolve()
            if real.is_file() and real.is_relative_to(self.folder):
                return real
        return None


class Adapters:
    """The adapters in a pipeline, loaded on first use and dropped by least recent use.

    An adapter is known by the bytes of its file: when a file changes, the next request that names it gets the new one,
    and two names of one content are one adapter. Only the thread that draws may call `take`.

    Args:
        pipe: The pipeline.
        catalogue: Where adapters come from.
        limit: Bytes that the adapters may take in the model.
    """

    def __init__(self, pipe: Any, catalogue: Catalogue, limit: int) -> None:
        self.pipe, self.catalogue, self.limit = pipe, catalogue, limit
        self.loads = self.drops = 0
        self._held: OrderedDict[str, Held] = OrderedDict()  # by digest, the longest unused first
        self._known: dict[str, tuple[Stamp, str]] = {}  # by name: the stamp and the digest of the file
        self._lock = threading.Lock()  # around the two, which /adapters reads

    @property
    def bytes(self) -> int:
        """Bytes of all adapters that are loaded."""
        with self._lock:
            return sum(held.bytes for held in self._held.values())

    @property
    def count(self) -> int:
        """Number of adapters that are loaded."""
        return len(self._held)

    def listed(self) -> list[dict[str, Any]]:
        """Every adapter that a request may name, and whether it is loaded."""
        with self._lock:
            held = {name: self._held.get(digest) for name, (_, digest) in self._known.items()}
        listed = []
        for name in self.catalogue.names():
            loaded = held.get(name)
            listed.append({"name": name, "loaded": loaded is not None, "bytes": loaded.bytes if loaded else None})
        return listed

    def take(self, adapters: Mapping[str, float], in_use: Collection[str] = ()) -> tuple[dict[str, float], list[str]]:
        """The adapters that a request names, loaded if need be.

        Args:
            adapters: Weight w_i of each name.
            in_use: Names in the model that have to stay.

        Returns:
            {name in the model: weight}, and what the loads warned of.

        Raises:
            UnknownAdapter: If there is no adapter of a name.
            NoRoom: If they do not fit the memory limit beside those in use.
            SerialLoraError: If a file is damaged, or is of another base's shape.
        """
        entry: dict[str, float] = {}
        said: list[str] = []
        for name, weight in adapters.items():
            held = self._hold(name, {*in_use, *entry})
            entry[held.name] = entry.get(held.name, 0.0) + weight
            said += held.warnings
        return entry, list(dict.fromkeys(said))

    def _hold(self, name: str, in_use: Collection[str]) -> Held:
        path = self.catalogue.find(name)
        try:
            stamp = Stamp.of(path)  # before the read: a later change then shows
            before, digest = self._known.get(name, (None, ""))
            if before != stamp or not stamp.trusted or digest not in self._held:
                if path.stat().st_size > self.limit + _LONGEST_HEADER:  # before it is read
                    raise NoRoom(f"The adapter {name!r} is larger than the memory limit of {self.limit:,} bytes.")
                content = path.read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                if digest not in self._held:
                    self._load(name, digest, content, in_use)
                with self._lock:
                    self._known[name] = stamp, digest
        except OSError as error:
            raise RequestError(f"The adapter {name!r} cannot be read: {error.strerror or error}.") from error
        with self._lock:
            self._held.move_to_end(digest)
            return self._held[digest]

    def _load(self, name: str, digest: str, content: bytes, in_use: Collection[str]) -> None:
        file = _read(name, content)
        size = sum(tensor.nbytes for part in file.components.values() for tensor in part.tensors.values())
        self._make_room(name, size, in_use)
        slot = f"served_{digest[:24]}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.pipe.load_serial_lora(file, slot)
            except SerialLoraError as error:
                raise RequestError(f"The adapter {name!r} cannot be used: {error}") from error
        self.pipe.set_serial_lora([])  # a request that names no adapter gets the base
        self.loads += 1
        said = tuple(f"{name}: {w.message}" for w in caught if issubclass(w.category, UserWarning))
        with self._lock:
            self._held[digest] = Held(slot, size, said)

    def _make_room(self, name: str, size: int, in_use: Collection[str]) -> None:
        with self._lock:
            free = self.limit - sum(held.bytes for held in self._held.values())
            named = {digest for _, digest in self._known.values()}
            # What no name leads to any more first: its file has changed.
            order = sorted(self._held, key=lambda digest: digest in named)
            chosen: list[str] = []
            for digest in order:
                if free >= size:
                    break
                if self._held[digest].name not in in_use:
                    chosen.append(digest)
                    free += self._held[digest].bytes
        if free < size:
            raise NoRoom(
                f"The adapter {name!r} takes {size:,} bytes, which do not fit the memory limit of {self.limit:,} bytes "
                "beside the other adapters of the request."
            )
        for digest in chosen:
            self.pipe.delete_serial_lora(self._held[digest].name)
            with self._lock:
                del self._held[digest]
            self.drops += 1


def _read(name: str, content: bytes) -> AdapterFile:
    """The adapter in a file's bytes. They are read from a copy: the file itself may be replaced or cut meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / WEIGHT_NAME
        copy.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # fields of the header that a newer version wrote
                return AdapterFile.read(copy)
        except SerialLoraError as error:
            raise RequestError(
                f"The adapter {name!r} is damaged: {str(error).replace(str(copy), 'its file')}"
            ) from error
