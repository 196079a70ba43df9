"""A YAML file of options, read as it is written: what looks like text stays text, and what is not plain is an error.

PyYAML's own loader guesses a type for each value (`output_dir: 1e-4` becomes 0.0001, `no` a truth value, and the last
of two equal keys wins). Here each value keeps its text until the option that it belongs to says what type it has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import SerialLoraError

_LARGEST = 1 << 20  # bytes: a file of options has a few hundred
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_STANDARD = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Value:
    """One value of the file, not yet of a type.

    Args:
        node: What YAML's parser made of it.
        path: The file, for messages.
        flag: The flag that names it.
    """

    node: yaml.Node
    path: Path
    flag: str = "--config"

    def value_of(
        self, name: str, scalar: type, shape: str, convert: Callable[[str], Any] | None, choices: Collection[str] | None
    ) -> Any:
        """The value as the flag would give it; None for null.

        Args:
            name: Name of the option.
            scalar: Its type: bool, int, float or str.
            shape: "one", "a list" or "a mapping" of that type.
            convert: From text to its value, instead of the type's own.
            choices: Values that it may have.

        Raises:
            SerialLoraError: If it cannot be that.
        """
        if self._is_null(self.node):
            return None
        if scalar is bool:
            return self._truth(name)
        one = lambda node: self._one(name, node, convert or scalar, choices)  # noqa: E731
        if shape == "a mapping":
            if not isinstance(self.node, yaml.MappingNode):
                raise self._error(name, "it must be a mapping, 'key: value' lines")
            keys = [self._one(name, key, str, None) for key, _ in self.node.value]
            if len(set(keys)) < len(keys):
                raise self._error(name, "a key is given twice")
            return dict(zip(keys, (one(value) for _, value in self.node.value), strict=True))
        if shape == "a list":
            nodes = self.node.value if isinstance(self.node, yaml.SequenceNode) else [self.node]
            if not nodes:
                raise self._error(name, "the list is empty; leave it out or write null")
            return [one(node) for node in nodes]
        return one(self.node)

    def _one(self, name: str, node: yaml.Node, convert: Callable[[str], Any], choices: Collection[str] | None) -> Any:
        if not isinstance(node, yaml.ScalarNode) or self._is_null(node):
            raise self._error(name, "not a single value", node)
        try:
            value = convert(node.value)
        except ValueError as error:
            raise self._error(name, str(error), node) from error
        if choices is not None and value not in choices:
            raise SerialLoraError(
                f"{self.flag} {self.path}: {name} must be one of {', '.join(map(str, choices))}; got {value!r}."
            )
        return value

    def _truth(self, name: str) -> bool:
        value = self.node.value if isinstance(self.node, yaml.ScalarNode) and self.node.style is None else None
        if value not in _TRUTHS:
            raise SerialLoraError(f"{self.flag} {self.path}: {name} must be true or false; got {_shown(self.node)}.")
        return _TRUTHS[value]

    @staticmethod
    def _is_null(node: yaml.Node) -> bool:
        return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _NULLS

    def _error(self, name: str, reason: str, node: yaml.Node | None = None) -> SerialLoraError:
        return SerialLoraError(f"{self.flag} {self.path}: {name} cannot be {_shown(node or self.node)}: {reason}.")


def read_config(path: Path, flag: str = "--config") -> Iterator[tuple[str, Value]]:
    """The keys of a file and their values.

    Raises:
        SerialLoraError: If there is no such file, or it is not YAML or not 'option: value' lines.
    """
    root = _root(path, flag)
    if not isinstance(root, yaml.MappingNode):
        raise SerialLoraError(f"{flag} {path} must hold 'option: value' lines; got {_kind(root)}.")
    return _entries(root, path, flag)


def read_list(path: Path, flag: str) -> list[Iterator[tuple[str, Value]]]:
    """The entries of a file that holds a list of 'option: value' lines.

    Raises:
        SerialLoraError: If there is no such file, or it is not YAML or not such a list.
    """
    root = _root(path, flag)
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        raise SerialLoraError(f"{flag} {path} must hold a list, '- option: value' lines; got {_kind(root)}.")
    if wrong := [node for node in root.value if not isinstance(node, yaml.MappingNode)]:
        raise SerialLoraError(f"{flag} {path}: each entry must be 'option: value' lines; got {_shown(wrong[0])}.")
    return [_entries(node, path, flag) for node in root.value]


def _entries(root: yaml.MappingNode, path: Path, flag: str) -> Iterator[tuple[str, Value]]:
    _check_tags(path, root, flag)
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise SerialLoraError(f"{flag} {path}: an option's name is a word; got {_shown(key)}.")
        yield key.value, Value(value, path, flag)


def _root(path: Path, flag: str) -> yaml.Node | None:
    text = _text(path, flag)
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise SerialLoraError(f"{flag} {path} is not YAML: {error}") from error
    except RecursionError as error:
        raise SerialLoraError(f"{flag} {path} must hold 'option: value' lines; it is nested too deeply.") from error


def _text(path: Path, flag: str) -> str:
    if not path.is_file():
        raise SerialLoraError(f"{flag} {path}: there is no such file.")
    try:
        if path.stat().st_size > _LARGEST:
            raise SerialLoraError(f"{flag} {path} has {path.stat().st_size:,} bytes; a file of options has fewer.")
        content = path.read_bytes()
    except OSError as error:
        raise SerialLoraError(f"{flag} {path} cannot be read: {error}.") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in content:
        raise SerialLoraError(f"{flag} {path} is UTF-16 or binary; save it as UTF-8 text.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SerialLoraError(f"{flag} {path} is not UTF-8 text ({error}); save it as UTF-8.") from error


def _check_tags(path: Path, root: yaml.MappingNode, flag: str) -> None:
    """Refuse values that claim a type of their own, such as `!!python/name`."""
    for node in [node for pair in root.value for node in pair]:
        inner = node.value if isinstance(node, yaml.SequenceNode) else []
        for tagged in (node, *inner):
            if not tagged.tag.startswith(_STANDARD) or "python" in tagged.tag:
                raise SerialLoraError(f"{flag} {path}: the tag {tagged.tag} means nothing here; leave it out.")


def _kind(node: yaml.Node | None) -> str:
    if node is None:
        return "nothing"
    return {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}.get(type(node), "something else")


def _shown(node: yaml.Node) -> str:
    """A value for a message, short, as Python would write it."""
    if not isinstance(node, yaml.ScalarNode):
        return {yaml.SequenceNode: "a list", yaml.MappingNode: "a mapping"}[type(node)]
    if node.style is None and node.value in _TRUTHS:
        return repr(_TRUTHS[node.value])
    return repr(node.value[:80])
