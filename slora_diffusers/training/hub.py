"""Upload a result to the Hub, with a model card that says how to use it."""

from __future__ import annotations

import argparse
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder

_CARD = """
# {name}

A Serial LoRA adapter for `{base}`, trained with slora_diffusers for {steps} steps at rank {rank}.

```python
import slora_diffusers
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.load_serial_lora("{name}")
```
"""


def write_card(options: argparse.Namespace, name: str) -> Path:
    """Write `README.md`, the model card, into the run's folder."""
    data = ModelCardData(
        base_model=options.pretrained_model_name_or_path, library_name="diffusers", tags=["serial-lora", "lora"]
    )
    text = _CARD.format(
        name=name,
        base=options.pretrained_model_name_or_path,
        steps=options.max_train_steps,
        rank=options.rank,
    )
    path = Path(options.output_dir) / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(path)
    return path


def push_to_hub(options: argparse.Namespace) -> str:
    """Upload the run's folder, without its checkpoints, caches and logs; gives the repository's name."""
    name = options.hub_model_id or Path(options.output_dir).name
    repository = create_repo(name, exist_ok=True, token=options.hub_token).repo_id
    write_card(options, repository)
    upload_folder(
        repo_id=repository,
        folder_path=options.output_dir,
        token=options.hub_token,
        ignore_patterns=["checkpoint-*", ".checkpoint-*", "cache/*", "logs/*"],
        commit_message="Upload the adapter",
    )
    return repository
