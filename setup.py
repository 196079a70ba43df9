"""What pyproject.toml cannot say: the README as PyPI shows it, where no file lies beside it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
_PICTURE = re.compile(r"!\[[^]]*\]\((?!https?:)([^)]+)\)")
_LINK = re.compile(r"(?<!!)\[([^]]+)\]\((?!https?:)([^)]+)\)")


def pypi_page(text: str, repository: str | None) -> str:
    """The README with addresses under the project's repository; without one, no pictures, and text for links."""
    text = re.sub(r"<!--.*?-->\n", "", text)
    if repository is None:
        return _LINK.sub(r"\1", re.sub(_PICTURE.pattern + r"\n\n(\*[^*]+\*\n\n)?", "", text))
    at = repository.rstrip("/")
    text = _PICTURE.sub(lambda found: found[0].replace(f"({found[1]})", f"({at}/raw/HEAD/{found[1]})"), text)
    return _LINK.sub(rf"[\1]({at}/blob/HEAD/\2)", text)


if __name__ == "__main__":
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    page = pypi_page((ROOT / "README.md").read_text(encoding="utf-8"), urls.get("Repository"))
    setup(long_description=page, long_description_content_type="text/markdown")
