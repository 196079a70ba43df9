"""Classifies images with what train_scripts/train_vit_classification.py or train_clip.py saved.

slora classify photo.jpg more_photos --model outputs/classifier --json results.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import SerialLoraError
from ..heads.classification import SerialLoraForImageClassification
from ..heads.losses import SINGLE_LABEL
from ..heads.prompts import SerialLoraForPromptClassification
from .inference import image_files, make_parser, open_model, predictions

SCORES = {
    SINGLE_LABEL: lambda logits: logits.softmax(0),
    "multi_label_classification": lambda logits: logits.sigmoid(),
    "regression": lambda logits: logits,
}
"""Problem of a model -> what is shown of its logits (classes,)."""


def _shown(entry: dict[str, Any]) -> str:
    return f"{100 * entry['probability']:.1f} %" if "probability" in entry else f"{entry['value']:.4g}"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Print a table of the likeliest classes of every image, and return them; --json writes them too."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--top", type=int, default=3, help="Classes to show of each image.")
    parser.add_argument("--json", type=Path, help="File to write the results to.")
    options = parser.parse_args(argv)
    if options.top < 1:
        raise SerialLoraError(f"--top must be at least 1; got {options.top}.")
    paths = image_files(options.images)
    model = open_model((SerialLoraForImageClassification, SerialLoraForPromptClassification), options)
    problem = getattr(model, "problem_type", SINGLE_LABEL)
    quantity = "value" if problem == "regression" else "probability"
    results, skipped = [], []
    for path, _, logits in predictions(model, paths, options, skipped):
        best = SCORES[problem](logits).topk(min(options.top, model.num_labels))
        classes = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found = [{"label": model.label_names[i], quantity: p} for i, p in classes]
        results.append({"file": str(path), "classes": found})

    table = Table("image", *(f"{n + 1}." for n in range(min(options.top, model.num_labels))))
    for result in results:
        cells = [f"{c['label']} {_shown(c)}" for c in result["classes"]]
        table.add_row(Path(result["file"]).name, *cells)
    Console().print(table)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"labels": list(model.label_names), "images": results, "skipped": skipped}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return results
