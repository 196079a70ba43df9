"""Write the tables of supported architectures into the documentation, from the records themselves.

python -m docs.build_tables            rewrite the marked regions
python -m docs.build_tables --check    say what is out of date, and fail
"""

from __future__ import annotations

import sys
from pathlib import Path

from slora_diffusers.architectures import REFUSED, Architecture, Pair
from slora_diffusers.records import audio, image, video, vision

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "Image": image.RECORDS,
    "Video": video.RECORDS,
    "Audio and molecules": audio.RECORDS,
    "Vision and text encoders": vision.RECORDS,
}


def full_tables() -> str:
    """One table per kind: family, classes, and every pair of every site."""
    parts = []
    for kind, records in KINDS.items():
        rows = "\n".join(_row(record) for record in records)
        parts.append(f"### {kind}\n\n| Family | Classes | Pairs | Note |\n|---|---|---|---|\n{rows}")
    return "\n\n".join(parts)


def refusals() -> str:
    """The classes that are refused, with the reason."""
    if not REFUSED:
        return "None: every transformer class of diffusers that was looked at has a record."
    return "\n".join(f"- `{name}`: {reason}" for name, reason in sorted(REFUSED.items()))


def families() -> str:
    """One row per kind, families only."""
    rows = (f"| {kind} | {', '.join(record.family for record in records)} |" for kind, records in KINDS.items())
    return "\n".join(["| | Families |", "|---|---|", *rows])


REGIONS = {
    ROOT / "docs" / "architectures.md": {"architectures": full_tables, "refusals": refusals},
    ROOT / "README.md": {"architectures": families},
}


def rebuilt(path: Path) -> str:
    """A page's text with its marked regions as they should be.

    Raises:
        ValueError: If the page lacks a marker.
    """
    text = path.read_text(encoding="utf-8")
    for name, build in REGIONS[path].items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise ValueError(f"{path.relative_to(ROOT)} needs the markers {begin} and {end}, in this order.")
        text = f"{before}{begin}\n{build()}\n{end}{after}"
    return text


def _row(record: Architecture) -> str:
    classes = "<br>".join(f"`{name}`" for name in record.models)
    sites: dict[tuple[Pair, ...], list[str]] = {}
    for pattern, pairs in record.sites.items():
        sites.setdefault(pairs, []).append(f"`{pattern}`" if pattern else "itself")
    cells = (f"{', '.join(patterns)}: {'; '.join(map(_pair, pairs))}" for pairs, patterns in sites.items())
    return f"| {record.family} | {classes} | {'<br>'.join(cells)} | {record.note} |"


def _pair(pair: Pair) -> str:
    inputs = " + ".join(pair.inputs)
    name = f"{pair.name} ({inputs})" if inputs and inputs != pair.name else pair.name
    text = f"{name} → {', '.join(pair.projections)}" + (f" (where there is no {pair.without})" if pair.without else "")
    return f"*{text}*" if pair.optional else text


def main() -> int:
    """Rewrite the pages, or with --check only compare them."""
    stale = [path for path in REGIONS if path.exists() and rebuilt(path) != path.read_text(encoding="utf-8")]
    for path in stale:
        if "--check" not in sys.argv:
            path.write_text(rebuilt(path), encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'out of date' if '--check' in sys.argv else 'rewritten'}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
