"""Segments images with what train_scripts/train_vit_segmentation.py saved: masks, overlay pictures, a table of areas.

slora segment photo.jpg more_photos --model outputs/segmenter --output_dir outputs/masks
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from ..errors import SerialLoraError
from ..heads.segmentation import SerialLoraForSemanticSegmentation
from ..training.vision.pictures import overlay
from .inference import image_files, make_parser, open_model, predictions


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Write `<name>_mask.png` (class indices) and `<name>_overlay.png` of every image, and `results.json`."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/segmentation"), help="Where the pictures go.")
    parser.add_argument("--opacity", type=float, default=0.55, help="Weight of the colours in the overlay, 0 to 1.")
    options = parser.parse_args(argv)
    if not 0 <= options.opacity <= 1:
        raise SerialLoraError(f"--opacity must lie in [0, 1]; got {options.opacity}.")
    paths = image_files(options.images)
    model = open_model((SerialLoraForSemanticSegmentation,), options)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results, skipped, used = [], [], set()
    for path, image, logits in predictions(model, paths, options, skipped):
        mask = logits.argmax(0).byte().numpy()  # (H, W)
        stems = (path.stem if number == 1 else f"{path.stem}_{number}" for number in count(1))
        stem = next(stem for stem in stems if stem not in used)  # files of one name in several folders
        used.add(stem)
        Image.fromarray(mask).save(options.output_dir / f"{stem}_mask.png")
        overlay(image, mask, model.label_names, options.opacity).save(options.output_dir / f"{stem}_overlay.png")
        shares = np.bincount(mask.ravel(), minlength=model.num_labels) / mask.size
        areas = {name: float(share) for name, share in zip(model.label_names, shares, strict=True) if share}
        results.append({"file": str(path), "mask": f"{stem}_mask.png", "areas": areas})

    table = Table("image", "share of the pixels")
    for result in results:
        areas = sorted(result["areas"].items(), key=lambda entry: -entry[1])
        table.add_row(Path(result["file"]).name, ", ".join(f"{name} {100 * share:.1f} %" for name, share in areas))
    Console().print(table)
    report = {"labels": list(model.label_names), "images": results, "skipped": skipped}
    (options.output_dir / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return results
