"""Regular expressions of sites: users write them and files carry them, so that none may take long.

A file's pattern is somebody else's: its length is bounded, what is known to be exponential is refused when it is read,
and the rest is matched with a limit of processor time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import regex

from ..errors import SerialLoraError

try:
    from re import _constants as _codes  # pyright: ignore[reportAttributeAccessIssue]
    from re import _parser  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # Python 3.10
    import sre_constants as _codes
    import sre_parse as _parser

LONGEST = 1000
MOST = 4096
MOST_LETTERS = 200_000
SECONDS = 0.05
"""Of processor time for one pattern at one path; an honest one takes microseconds."""

LONG = 10
"""Repetitions from which on one inside another counts as without end."""

_REPEATS = (_codes.MAX_REPEAT, _codes.MIN_REPEAT)
_GROUPS = (_codes.SUBPATTERN, _codes.BRANCH)


def check_patterns(patterns: Iterable[object], where: str) -> None:
    """Raise SerialLoraError unless all are regular expressions, and all together few and short enough."""
    given = list(patterns)
    check_number(given, where)
    for pattern in given:
        compile_pattern(pattern)


def check_number(patterns: Iterable[Any], where: str) -> None:
    """Raise SerialLoraError if there are so many patterns, or so long ones, that going through them takes long."""
    given = list(patterns)
    letters = sum(len(pattern) for pattern in given if isinstance(pattern, str))
    if len(given) > MOST or letters > MOST_LETTERS:
        raise SerialLoraError(
            f"{where} holds {len(given):,} patterns of {letters:,} letters; at most {MOST:,} patterns and "
            f"{MOST_LETTERS:,} letters are read. Write fewer: one regular expression can stand for many sites."
        )


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression, anchored at both ends, matches the path of a site.

    Raises:
        SerialLoraError: If it is not a regular expression, or takes too long.
    """
    compiled = compile_pattern(pattern)
    if isinstance(compiled, str):
        return compiled == path
    try:
        return compiled.fullmatch(path, timeout=SECONDS) is not None
    except (TimeoutError, RecursionError, MemoryError) as error:
        raise _slow(pattern) from error


def compile_pattern(pattern: Any) -> regex.Pattern[str] | str:
    """A regular expression of sites, compiled; the text itself where it stands for one path only.

    Raises:
        SerialLoraError: If it is not a regular expression, is too long, or could take exponential time.
    """
    if not isinstance(pattern, str) or len(pattern) > LONGEST:
        shown = repr(pattern)[:60] if isinstance(pattern, str | int | float | None) else type(pattern).__name__
        raise SerialLoraError(f"{shown} is not a regular expression of sites: a text of at most {LONGEST} letters.")
    return _compiled(pattern)


@lru_cache(maxsize=2 * MOST)
def _compiled(pattern: str) -> regex.Pattern[str] | str:
    plain = re.sub(r"\\(\W)", r"\1", pattern)
    if (
        re.escape(plain) == pattern
    ):  # as the library writes the places of single pairs: thousands, and no need to compile
        return plain
    try:
        exponential = _is_exponential(_parser.parse(pattern))
        compiled = regex.compile(pattern)
    except Exception as error:  # the parsers raise several kinds, RecursionError and OverflowError among them
        raise SerialLoraError(f"{pattern!r} is not a regular expression of sites: {error}.") from error
    if exponential:
        raise _slow(pattern)
    return compiled


def _is_exponential(parsed: Any) -> bool:
    """Whether it repeats what repetitions alone can match: `(x+)+` splits a text in 2^n ways."""
    for operation, argument in parsed:
        children = _children(operation, argument)
        if _is_long(operation, argument) and any(map(_is_loose, children)):
            return True
        if any(map(_is_exponential, children)):
            return True
    return False


def _is_loose(parsed: Any) -> bool:
    """Whether repetitions alone can match it, with no letter of its own beside them."""
    parts = [(operation, argument, _children(operation, argument)) for operation, argument in parsed]
    inner = [operation in _GROUPS and any(map(_is_loose, children)) for operation, _, children in parts]
    return any(
        loose or _is_long(operation, argument) for loose, (operation, argument, _) in zip(inner, parts, strict=True)
    ) and all(loose or operation in _REPEATS for loose, (operation, _, _) in zip(inner, parts, strict=True))


def _is_long(operation: Any, argument: Any) -> bool:
    return operation in _REPEATS and argument[1] >= LONG


def _children(operation: Any, argument: Any) -> list[Any]:
    """The parts of a parsed expression that are expressions themselves."""
    if operation is _codes.BRANCH:
        return list(argument[1])
    if operation in _REPEATS or operation in (_codes.SUBPATTERN, _codes.ASSERT, _codes.ASSERT_NOT):
        return [argument[-1]]
    if operation is _codes.GROUPREF_EXISTS:
        return [part for part in argument[1:] if part is not None]
    return [argument] if operation is getattr(_codes, "ATOMIC_GROUP", None) else []


def _slow(pattern: str) -> SerialLoraError:
    return SerialLoraError(
        f"The pattern {pattern!r} could take very long: it repeats what repeats. Write it without one repetition "
        "directly inside another."
    )
