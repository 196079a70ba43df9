"""Images for benchmarks/vit.py: in which of ten typefaces is a character set? From the fonts that matplotlib ships.

    python -m benchmarks.faces FACES.npz

Every letter of the Latin, Greek and Cyrillic blocks that all ten faces draw, once in each, and of those that look alike
(Latin and Cyrillic A) one: what is learnt from some letters is tested on others. DejaVu and STIX have licences that
allow this.
"""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralItalic",
)  # fmt: skip
BLOCKS = (range(0x41, 0x180), range(0x386, 0x3CF), range(0x400, 0x460))
SIDE = 42  # pixels


def draw(letter: int, font: ImageFont.FreeTypeFont, x: float = 0, y: float = 0) -> Image.Image:
    """A white letter on black, (x, y) pixels off the middle."""
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).text((SIDE / 2 + x, SIDE / 2 + y), chr(letter), fill=255, font=font, anchor="mm")
    return image


def main(path: str) -> None:
    """Write images (N, 42, 42) and labels (N,)."""
    files = [Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf") for face in FACES]
    drawn = [set(FT2Font(file).get_charmap()) for file in files]
    letters = [c for block in BLOCKS for c in block if unicodedata.category(chr(c))[0] == "L"]
    letters = [c for c in letters if all(c in face for face in drawn)]
    looks = [{draw(c, ImageFont.truetype(str(file), 30)).tobytes(): c for c in reversed(letters)} for file in files]
    letters = [c for c in letters if all(c in look.values() for look in looks)]
    r = np.random.default_rng(0)
    images, labels = [], []
    for label, file in enumerate(files):
        for letter in letters:  # size and place say nothing of the face
            font = ImageFont.truetype(str(file), int(r.integers(20, 31)))
            images.append(np.asarray(draw(letter, font, *r.uniform(-4, 4, 2))))
            labels.append(label)
    np.savez_compressed(path, images=np.stack(images), labels=np.array(labels, np.uint8))
    print(f"{path}: {len(images)} images, {len(letters)} letters in each of {len(FACES)} faces")


if __name__ == "__main__":
    main(sys.argv[1])
