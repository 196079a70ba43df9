"""Figures of the house: how many modules lie where, how long they are, and where one thing is said.

python -m docs.house              the files as they are
python -m docs.house 61f52dd      beside those of a commit
"""

from __future__ import annotations

import ast
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from statistics import median
from subprocess import run
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
LOOKS_INTO_A_HEADER = re.compile(r"""(\[|\.get\()["']components["']""")


def trees(package: Path) -> dict[str, ast.Module]:
    """{module's path in the package: its syntax tree}."""
    paths = sorted(package.rglob("*.py"))
    return {path.relative_to(package).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def lines_of_functions(tree: ast.Module) -> Iterator[int]:
    """Lines of each function of a module, without its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            without = docstring.end_lineno - docstring.lineno + 1 if docstring and docstring.end_lineno else 0
            yield (node.end_lineno or node.lineno) - node.lineno + 1 - without


def looking_into_headers(package: Path) -> list[str]:
    """The modules that index the components of a header."""
    paths = sorted(package.rglob("*.py"))
    return [p.relative_to(package).as_posix() for p in paths if LOOKS_INTO_A_HEADER.search(p.read_text("utf-8"))]


def _declared(tree: ast.Module) -> Iterator[str]:
    """Names of options: fields given by option() or but(), or once, pairs of a name and value() in a table."""
    for node in ast.walk(tree):
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Call(func=ast.Name(id="option" | "but"))):
                yield name
            case ast.Tuple(elts=[ast.Constant(value=str(name)), ast.Call(func=ast.Name(id="value" | "flag"))]):
                yield name


def modules_that_name_options(package: Path) -> dict[str, set[str]]:
    """{option: modules that declare it, or name it in a text of their own}."""
    parsed = {path: tree for path, tree in trees(package).items() if path.startswith(("training/", "recipes/"))}
    places: dict[str, set[str]] = defaultdict(set)
    for path, tree in parsed.items():
        for name in _declared(tree):
            places[name].add(path)
    for path, tree in parsed.items():
        texts = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        for name in places.keys() & texts:
            places[name].add(path)
    return places


def figures(root: Path) -> dict[str, str]:
    """{what is counted: its number} of the package below a checkout's root."""
    package = root / "slora_diffusers"
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in package.rglob("*.py")]
    functions = [length for tree in trees(package).values() for length in lines_of_functions(tree)]
    named = [len(modules) for modules in modules_that_name_options(package).values()]
    return {
        "modules in the package's root": str(len(list(package.glob("*.py"))) - 1),
        "modules in `training/` itself": str(len(list((package / "training").glob("*.py"))) - 1),
        "lines of a file: median, largest": f"{median(lines):.0f}, {max(lines)}",
        "lines of a function: median, largest": f"{median(functions):.0f}, {max(functions)}",
        "modules that look into a header": str(len(looking_into_headers(package))),
        "modules that name one option: mean, most": f"{sum(named) / len(named):.2f}, {max(named)}",
    }


def at(commit: str) -> dict[str, str]:
    """The figures of a commit."""
    archive = run(["git", "archive", commit, "slora_diffusers"], cwd=ROOT, check=True, capture_output=True).stdout
    with TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        return figures(Path(folder))


def main() -> None:
    """Print the figures, beside those of the commit that was named."""
    columns = {**{commit: at(commit) for commit in sys.argv[1:]}, "now": figures(ROOT)}
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in columns["now"]:
        print(f"| {name} | {' | '.join(column[name] for column in columns.values())} |")


if __name__ == "__main__":
    main()
