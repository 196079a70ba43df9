"""Run by test_loader.py in a process of its own: reload folders with stock diffusers, run them, write what came out.

    python stock_reload.py jobs.json results.pt

Each job is {"folder", "call": arguments of the pipeline}; each result {"images", "log": warnings while loading}.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


class Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main() -> None:
    torch.set_num_threads(1)
    diffusers_logging.disable_progress_bar()
    recorder = Recorder()
    for library in (diffusers_logging, transformers_logging):
        library.add_handler(recorder)
    results = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        recorder.lines.clear()
        pipe: Any = DiffusionPipeline.from_pretrained(job["folder"])
        log = [line for line in recorder.lines if "serial_lora" in line or "not used" in line or "newly" in line]
        pipe.set_progress_bar_config(disable=True)
        images = pipe(**job["call"], generator=torch.Generator().manual_seed(0), output_type="np").images
        keys = [
            key for part in pipe.components.values() if isinstance(part, torch.nn.Module) for key in part.state_dict()
        ]
        results.append({"images": torch.from_numpy(images), "log": log, "pairs": [k for k in keys if "serial" in k]})
    assert not any(name.startswith("slora_diffusers") for name in sys.modules)
    torch.save({"results": results, "import": what_importing_changes()}, sys.argv[2])


def what_importing_changes() -> dict[str, list[str]]:
    """Attributes of DiffusionPipeline that are new, or another than before, once slora_diffusers is imported."""
    before = dict(vars(DiffusionPipeline))
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import slora_diffusers  # noqa: F401

    after = dict(vars(DiffusionPipeline))
    return {"new": sorted(set(after) - set(before)), "other": [k for k, v in before.items() if after.get(k) is not v]}


if __name__ == "__main__":
    main()
