"""Which pixels of an image count in the loss: a file of grey values, or the image's own alpha channel.

White counts in full, black as little as is asked for; between them lie shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from ...errors import SerialLoraError
from .images import Item, opened, whole
from .masks import paired

if TYPE_CHECKING:
    from ..options import MaskOptions


def masked(items: list[Item], folder: str | Path, options: MaskOptions) -> list[Item]:
    """The images of a folder with the masks that the options ask for.

    Raises:
        SerialLoraError: If two kinds are asked for, or an image has no mask, or one that is not its own.
    """
    if options.mask_data_dir is not None and options.alpha_mask:
        raise SerialLoraError("give one of --mask_data_dir and --alpha_mask.")
    if options.mask_data_dir is not None:
        return with_mask_files(items, options.mask_data_dir, options.unmasked_weight)
    return with_alpha(items, folder, options.unmasked_weight) if options.alpha_mask else items


def with_mask_files(items: Sequence[Item], folder: str | Path, floor: float) -> list[Item]:
    """The items with the masks of the same names in another folder.

    Args:
        items: Images of one folder.
        folder: Where the masks are, under the images' names but for their endings.
        floor: Weight of a pixel where the mask is black, of 0 to 1.

    Raises:
        SerialLoraError: If an image has no mask or two, or one is damaged, of another shape, or black throughout.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SerialLoraError(f"{folder} is not a folder: give the folder that holds the masks.")
    files = paired(items, folder)
    return [
        _checked(replace(item, mask=partial(grey, files[item.name]), floor=floor), files[item.name]) for item in items
    ]


def with_alpha(items: Sequence[Item], folder: str | Path, floor: float) -> list[Item]:
    """The items of a folder with their alpha channels as masks; those that have none count in full.

    Raises:
        SerialLoraError: If an image is transparent throughout.
    """
    masked = []
    for item in items:
        path = Path(folder) / item.name
        masked.append(
            _checked(replace(item, mask=partial(alpha, path), floor=floor), path) if has_alpha(path) else item
        )
    return masked


def grey(path: Path) -> Image.Image:
    """A file as upright grey values of 8 bits; transparent pixels are black."""

    def read(image: Image.Image) -> Image.Image:
        image = ImageOps.exif_transpose(image)
        if _transparent(image):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
        if image.mode == "1" or not image.mode.startswith(("I", "F")):
            return image.convert("L")
        return image.point(lambda value: value / 257).convert("L")  # 16 bits

    with opened(path) as image:
        return whole(read, image, str(path))


def alpha(path: Path) -> Image.Image:
    """The alpha channel of a file, upright."""
    with opened(path) as image:
        return whole(lambda i: ImageOps.exif_transpose(i).convert("RGBA").getchannel("A"), image, str(path))


def has_alpha(path: Path) -> bool:
    """Whether a file has an alpha channel."""
    with opened(path) as image:
        return _transparent(image)


def _transparent(image: Image.Image) -> bool:
    return "A" in image.mode or image.mode in ("La", "RGBa") or "transparency" in image.info


def _checked(item: Item, path: Path) -> Item:
    assert item.mask is not None
    mask = item.mask()
    if (size := (mask.height, mask.width)) != item.size:
        raise SerialLoraError(f"the mask {path} has {size} pixels (height, width), its image {item.size}.")
    if not item.floor and mask.getextrema()[1] == 0:
        raise SerialLoraError(
            f"the mask {path} is black throughout: nothing of its image would count. Leave the image out, or give "
            "--unmasked_weight."
        )
    return item
