"""Options as fields of frozen dataclasses: `option` declares one, `parse` fills them from flags and a YAML file.

A field says everything about its option: flag, type, default, bounds, choices, and what a resumed run may do to it. A
recipe's options are one dataclass that inherits the groups it wants; `options.py` is the table of the shared ones.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import SerialLoraError
from .config_file import Value, read_config

T = TypeVar("T")
FREE, WARNED, REFUSED = "free", "warned", "refused"
_SWITCH = argparse.BooleanOptionalAction


@dataclass(frozen=True)
class Spec:
    """What an option is, beside its name, type and default.

    Args:
        help: One line for --help.
        within: The interval that its numbers lie in, e.g. "[0, 1)" or "[1, inf)".
        choices: The values that it may have.
        aliases: Other names of the flag.
        resume: What a resumed run may do to it: FREE changes nothing that is computed, WARNED computes something else
            from here on, REFUSED does not fit the state that was saved.
        required: Whether it has to be given.
        secret: Whether it is never written down.
        convert: From text to its value, instead of the type's own.
    """

    help: str
    within: str | None = None
    choices: Sequence[str] | None = None
    aliases: tuple[str, ...] = ()
    resume: str = WARNED
    required: bool = False
    secret: bool = False
    convert: Callable[[str], Any] | None = None


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of an options dataclass; `more` are the other fields of `Spec`."""
    return field(default=default, metadata={"spec": Spec(help, **more)})


def but(group: type, name: str, default: Any, **more: Any) -> Any:
    """The option of another group, with another default here (and what else is said)."""
    spec = {f.name: f for f in fields(group)}[name].metadata["spec"]
    return field(default=default, metadata={"spec": dataclasses.replace(spec, **more)})


@dataclass(frozen=True)
class Kind:
    """How an option's text becomes its value: one, several ("a list") or named ("a mapping") of a scalar type."""

    scalar: type
    shape: str = "one"


def kind_of(hint: Any) -> Kind:
    """The kind behind a type annotation such as `int | None`, `list[str] | None` or `dict[str, int] | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) in (list, dict):
        return Kind(get_args(hint)[-1], "a list" if get_origin(hint) is list else "a mapping")
    return Kind(hint)


def specs_of(options: Any) -> dict[str, tuple[Spec, Kind, Any]]:
    """{name: (spec, kind, default)} of every option of a dataclass."""
    hints = get_type_hints(options if isinstance(options, type) else type(options))
    return {f.name: (f.metadata["spec"], kind_of(hints[f.name]), f.default) for f in fields(options)}


def parse(options: type[T], description: str, argv: Sequence[str] | None = None, elsewhere: Any = None) -> T:
    """Options from the flags and from the file that --config names; flags win.

    Args:
        options: The dataclass.
        description: What the recipe does, for --help.
        argv: The command line; that of the process by default.
        elsewhere: {flag of another script: what to use instead}, for those who come from there.

    Raises:
        SerialLoraError: If the file is missing or no mapping, or a key or a value is not allowed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser, specs = make_parser(options, description), specs_of(options)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is not None:
        _set_defaults(parser, specs, Path(path))
    namespace, unknown = parser.parse_known_args(argv)
    _explain(parser, argv, unknown, elsewhere or {})
    values = {name: getattr(namespace, name) for name in specs}
    for name, (spec, kind, _) in specs.items():
        values[name] = _checked(name, values[name], spec, kind)
    return options(**values)


class _Dumper(yaml.SafeDumper):
    """Quotes texts with a rare line break, which YAML would fold into a space."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(line_break in text for line_break in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def save_options(options: Any, path: Path) -> None:
    """Write the options in the form that --config reads."""
    specs = specs_of(options)
    kept = {
        name: value for name in specs if (value := getattr(options, name)) is not None and not specs[name][0].secret
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.dump(kept, Dumper=_Dumper, sort_keys=True, allow_unicode=True, width=float("inf"))
    path.write_text(text, encoding="utf-8")


def make_parser(options: type, description: str) -> argparse.ArgumentParser:
    """A parser of an options dataclass's flags, grouped as in the code, and of --config."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags given beside it win.")
    groups: dict[type, Any] = {}
    for name, (spec, kind, default) in specs_of(options).items():
        owner = next(c for c in options.__mro__ if name in inspect.get_annotations(c))
        if owner not in groups:
            groups[owner] = parser.add_argument_group((owner.__doc__ or owner.__name__).partition("\n")[0].rstrip("."))
        settings: dict[str, Any] = {"default": default, "help": spec.help, "dest": name}
        if kind.scalar is bool:
            settings["action"] = _SWITCH
        else:
            settings |= {"type": _converter(spec, kind), "required": spec.required}
            if spec.choices is not None:
                settings["choices"] = list(spec.choices)
            if kind.shape != "one":
                settings["nargs"] = "+"
            if kind.shape == "a mapping":
                settings |= {"metavar": "KEY=VALUE", "action": _Mapping}
        groups[owner].add_argument(*(f"--{flag}" for flag in (name, *spec.aliases)), **settings)
    return parser


def python_value(text: str) -> Any:
    """A number, truth value, tuple, ... where the text is one, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


class _Mapping(argparse.Action):
    """KEY=VALUE entries as a dict; the last "=" divides, for keys may be regular expressions."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if len(given := dict(values)) < len(values):
            parser.error(f"argument {option_string}: a key is given twice")
        setattr(namespace, self.dest, given)


def _converter(spec: Spec, kind: Kind) -> Callable[[str], Any]:
    scalar = spec.convert or {int: int, float: float}.get(kind.scalar, str)
    if kind.shape != "a mapping":
        return scalar

    def entry(text: str) -> tuple[str, Any]:
        key, equals, value = text.rpartition("=")
        if not equals or not key:
            raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
        return key, scalar(value)

    return entry


def _set_defaults(parser: argparse.ArgumentParser, specs: Mapping[str, Any], path: Path) -> None:
    """Make a file's values the defaults."""
    given = values_of(read_config(path), specs, f"--config {path}")
    given = {name: value for name, value in given.items() if value is not None}  # null stands for the default
    parser.set_defaults(**given)
    for action in parser._actions:
        action.required &= action.dest not in given


def values_of(
    entries: Iterable[tuple[str, Value]], specs: Mapping[str, Any], where: str, short: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """{option: value} of a file's lines.

    Args:
        entries: Its keys and values.
        specs: The options that there are, as `specs_of` tells them.
        where: What the file is, for messages.
        short: Further names of options.

    Raises:
        SerialLoraError: If there is no such option, it is given twice, or it cannot have the value.
    """
    names = {flag: name for name, (spec, _, _) in specs.items() for flag in (name, *spec.aliases)}
    names |= short or {}
    given: dict[str, Any] = {}
    for key, node in entries:
        flag = key.replace("-", "_").lstrip("_")
        if flag not in names:
            near = difflib.get_close_matches(flag, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(names))}."
            raise SerialLoraError(f"{where}: unknown option {key!r}; {hint}")
        name = names[flag]
        if name in given:
            raise SerialLoraError(f"{where}: {name} is given twice; keep one line.")
        spec, kind, _ = specs[name]
        value = node.value_of(name, kind.scalar, kind.shape, spec.convert, spec.choices)
        given[name] = _checked(name, value, spec, kind)
    return given


def _explain(parser: Any, argv: Sequence[str], unknown: Sequence[str], elsewhere: Mapping[str, str]) -> None:
    """Say what to do about arguments that no option takes."""
    for flag in (argument.partition("=")[0] for argument in unknown):
        if flag in elsewhere:
            raise SerialLoraError(f"{flag} of diffusers' script is not here: {elsewhere[flag]}.")
    switches = {flag for a in parser._actions if isinstance(a, _SWITCH) for flag in a.option_strings}
    for flag, stray in pairwise(argv):
        if flag in switches and stray in unknown and not stray.startswith("-"):
            raise SerialLoraError(f"{flag} is a switch here: give it, or its --no- form, without {stray}.")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")


def _checked(name: str, value: Any, spec: Spec, kind: Kind) -> Any:
    """The value, if its numbers lie within the option's bounds."""
    numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if kind.scalar in (int, float):
        for number in (n for n in numbers if n is not None):
            check_bounds(f"--{name}", number, spec.within)
    return value


def check_bounds(name: str, number: float, within: str | None) -> None:
    """Raise SerialLoraError unless a number is finite and lies within an interval such as "[0, 1)"."""
    if (isinstance(number, float) and not math.isfinite(number)) or abs(number) >= 2**63:
        raise SerialLoraError(f"{name} must be a finite number, of at most 18 digits; got {str(number)[:30]}.")
    if within is None:
        return
    low, high = (float(end) for end in within[1:-1].split(","))
    above = number >= low if within[0] == "[" else number > low
    below = number <= high if within[-1] == "]" else number < high
    if above and below:
        return
    if math.isinf(high):
        rule = f"be at least {low:g}" if within[0] == "[" else f"be above {low:g}"
    else:
        rule = f"lie in {within}"
    raise SerialLoraError(f"{name} must {rule}; got {number}.")
