"""The model card of a model with a head: what it tells apart, and the code that opens it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CARD = """\
# {name}

A {task} model: a head and a [Serial LoRA](https://arxiv.org/abs/2503.17750) adapter over {base}.

Labels: {labels}.

## Use it

`pip install slora_diffusers`, then:

```python
from slora_diffusers import {kind}

model = {kind}.from_pretrained({repository!r}{backbone})
{call}
```
"""
_CALLS = {
    "promptable segmentation": "logits = model.predict(image, input_boxes=boxes)  # of a PIL image, (prompts, H, W)"
}
_CALL = "logits = model.predict(image)  # of a PIL image of any size"
_SHOWN = 50


def write_head_card(model: Any, folder: Path, repository: str, tags: Sequence[str] = ()) -> Path:
    """Write `README.md` beside a saved model with a head.

    Args:
        model: The model with its head.
        folder: Where its file is.
        repository: Hub id, or folder, that the code opens it from.
        tags: Tags besides serial-lora.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name = getattr(getattr(model.backbone, "config", None), "_name_or_path", None)
    on_hub = bool(name) and not Path(name).exists()
    data = ModelCardData(
        base_model=name if on_hub else None, tags=["serial-lora", *tags], pipeline_tag=model.task.replace(" ", "-")
    )
    labels = ", ".join(model.label_names[:_SHOWN]) + (", ..." if len(model.label_names) > _SHOWN else "")
    text = _CARD.format(
        name=Path(repository).name,
        task=model.task,
        base=f"[{name}](https://huggingface.co/{name})" if on_hub else f"a `{type(model.backbone).__name__}`",
        labels=labels,
        kind=type(model).__name__,
        repository=repository,
        call=_CALLS.get(model.task, _CALL),
        backbone="" if name else ", backbone=backbone",
    )
    path = folder / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(path)
    return path
