"""The demo's images: capitals drawn from the typefaces that matplotlib ships (DejaVu, STIX, Computer Modern).

A *face* is a font file and the alphabet to take from it: the plain capitals, or one of Unicode's mathematical
alphabets, which is where STIX keeps its script, calligraphic and double-struck letters.
`PRETRAINING_FACES` are what the base model sees. `NEW_STYLES` are never shown to it; the adapter is trained on
`SEEN_LETTERS` of one of them and tested on `HELD_OUT_LETTERS` of the same face.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..errors import SerialLoraError

IMAGE_SIZE = 32
LETTERS = string.ascii_uppercase  # class id = position in the alphabet
SEEN_LETTERS = LETTERS[0::2]  # A C E ... Y: what the adapter is trained on
HELD_OUT_LETTERS = LETTERS[1::2]  # B D F ... Z: what it is tested on

_SUPERSAMPLING = 4  # glyphs are drawn this much larger, transformed, then averaged down
EM_PIXELS = 27  # size of the em square in the final image: capitals are about 20 pixels high
_MARGIN = 1  # pixels left free on every side: wider glyphs are shrunk


@dataclass(frozen=True)
class Face:
    """One typeface.

    `font` is the stem of one of matplotlib's files or the whole path of another, `alphabet` a Unicode name prefix, a
    first code point, or None (A to Z), `em` the side of the em square in pixels of the final image.
    """

    name: str
    font: str
    alphabet: str | int | None = None
    em: int = EM_PIXELS

    def character(self, letter: str) -> str:
        """The code point that draws `letter` in this face."""
        if self.alphabet is None:
            return letter
        if isinstance(self.alphabet, int):  # a private-use block, in alphabetical order
            return chr(self.alphabet + LETTERS.index(letter))
        try:
            return unicodedata.lookup(f"MATHEMATICAL {self.alphabet} CAPITAL {letter}")
        except KeyError:  # Unicode put some letters in an older block: SCRIPT CAPITAL B, BLACK-LETTER CAPITAL C, ...
            return unicodedata.lookup(f"{self.alphabet.replace('FRAKTUR', 'BLACK-LETTER')} CAPITAL {letter}")


_CORE_FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10"),
)
_MORE_FONTS = (*(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")), "cmtt10", "cmmi10")
CORE_FACES = tuple(Face(font, font) for font in _CORE_FONTS)  # the 16 that the last stage of pretraining keeps to
PRETRAINING_FACES = (
    *CORE_FACES,
    *(Face(font, font) for font in _MORE_FONTS),
    Face("DejaVu double-struck", "DejaVuSans", "DOUBLE-STRUCK"),
    Face("STIX double-struck", "STIXGeneral", "DOUBLE-STRUCK"),
    Face("STIX sans", "STIXGeneral", "SANS-SERIF"),
    Face("STIX sans bold", "STIXGeneralBol", "SANS-SERIF BOLD"),
    Face("STIX sans italic", "STIXGeneralItalic", "SANS-SERIF ITALIC"),
    Face("STIX sans bold italic", "STIXGeneralBolIta", "SANS-SERIF BOLD ITALIC"),
    Face("STIX mono", "STIXGeneral", "MONOSPACE"),
)
# No script, calligraphic or black-letter face is in the list above, so each of these is new to the base.
NEW_STYLES = {
    "calligraphic": Face("Computer Modern calligraphic", "cmsy10"),
    "bold-calligraphic": Face("STIX bold calligraphic", "STIXNonUniBolIta", 0xE247),
    "script": Face("STIX bold script", "STIXGeneralBolIta", "BOLD SCRIPT"),
    "fraktur": Face("STIX bold fraktur", "STIXGeneralBol", "BOLD FRAKTUR"),
}


@dataclass(frozen=True)
class Jitter:
    """A mild change of a glyph: `shift` in pixels, `scale` per axis, `shear` (dx per dy), extra stroke `weight`."""

    shift: tuple[float, float] = (0.0, 0.0)
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    weight: int = 0  # in supersampled pixels

    @staticmethod
    def moved(rng: np.random.Generator) -> Jitter:
        """Moved by up to a pixel and nothing else."""
        return Jitter(tuple(rng.uniform(-1, 1, 2)))

    @staticmethod
    def sample(rng: np.random.Generator) -> Jitter:
        x, y = rng.uniform(-1, 1, 2)
        size, aspect = rng.uniform(0.92, 1.06), rng.uniform(0.96, 1.04)
        return Jitter(
            (x, y),
            (size * aspect, size / aspect),
            rng.uniform(-0.06, 0.06),
            int(rng.integers(0, 2)),
        )


@lru_cache(maxsize=64)
def load_font(stem: str, pixels: int) -> ImageFont.FreeTypeFont:
    """One of matplotlib's fonts, by file stem, or any other, by its whole path, with an em of `pixels`."""
    path = Path(stem) if Path(stem).is_absolute() else Path(matplotlib.get_data_path(), "fonts", "ttf", f"{stem}.ttf")
    if not path.exists():  # cmti10, which pretraining draws with, came with matplotlib 3.11
        raise SerialLoraError(
            f"matplotlib {matplotlib.__version__} has no font {stem}; install a newer one: pip install -U matplotlib"
        )
    return ImageFont.truetype(path, pixels)


def render_glyph(face: Face, letter: str, jitter: Jitter = Jitter(), pixels: int = IMAGE_SIZE) -> np.ndarray:
    """One centred glyph, white on black: uint8 (pixels, pixels), where pixels is 32, 64 or 128."""
    font, character = load_font(face.font, face.em * _SUPERSAMPLING), face.character(letter)
    left, top, right, bottom = font.getbbox(character, stroke_width=jitter.weight)
    side = IMAGE_SIZE * _SUPERSAMPLING
    room = side - 2 * _MARGIN * _SUPERSAMPLING
    canvas = Image.new("L", (2 * side, 2 * side))
    origin = (side - (left + right) / 2, side - (top + bottom) / 2)
    ImageDraw.Draw(canvas).text(origin, character, font=font, fill=255, stroke_width=jitter.weight)

    fit = min(1.0, room / (right - left), room / (bottom - top))
    scale_x, scale_y = (fit * factor for factor in jitter.scale)
    shift_x, shift_y = (side / 2 + _SUPERSAMPLING * shift for shift in jitter.shift)
    # PIL maps each output pixel (x, y) to the input: undo the shift, then the scale and the shear, around the centre.
    a, b, e = 1 / scale_x, jitter.shear / scale_x, 1 / scale_y
    inverse = (a, b, side - a * shift_x - b * shift_y, 0.0, e, side - e * shift_y)
    canvas = canvas.transform((side, side), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)
    return np.asarray(canvas.reduce(side // pixels))


def glyph_images(
    faces: Sequence[Face],
    letters: str = LETTERS,
    variations: int = 0,
    seed: int = 0,
    jitter: Callable[[np.random.Generator], Jitter] = Jitter.sample,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every letter of every face: uint8 images (N, 32, 32) and class ids (N,).

    Args:
        faces: The faces to draw.
        letters: The capitals to draw.
        variations: Jittered copies of each glyph; 0 draws each once, unchanged.
        seed: Seeds the jitter.
        jitter: Draws how a copy differs from its glyph.
    """
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for face in faces:
        for letter in letters:
            jitters = [jitter(rng) for _ in range(variations)] or [Jitter()]
            images += [render_glyph(face, letter, jitter) for jitter in jitters]
            labels += [LETTERS.index(letter)] * len(jitters)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 images (N, 32, 32) -> what a VAE reads: float RGB in [-1, 1], (N, 3, 32, 32)."""
    return (images.float() / 127.5 - 1)[:, None].repeat(1, 3, 1, 1)
