"""`DiffusionPipeline` and `ModularPipeline` get the verbs as soon as they are there, and LoRA loaders a better error.

Importing diffusers' pipelines takes seconds (transformers, PEFT and every quantizer that is installed), and who adapts
a bare model needs none of them. So `import slora_diffusers` does not import them: it waits for whoever does.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

LORA_LOADER = "diffusers.loaders.peft"
CLASSES = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
    LORA_LOADER: "PeftAdapterMixin",
}
"""{module: its class that gets the verbs}; the last one loads the LoRAs of every model of diffusers."""


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds these modules as the other finders do, and installs the verbs once they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in CLASSES:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if module.__name__ == fullname:  # some loaders serve several modules
                    _install(fullname, getattr(module, CLASSES[fullname]))

            spec.loader.exec_module = exec_module
        return spec


def give_verbs() -> None:
    """Give diffusers' pipelines the verbs of `SerialLoraLoaderMixin`: now, or when diffusers defines them."""
    for module, name in CLASSES.items():
        if found := getattr(sys.modules.get(module), name, None):
            _install(module, found)
    if not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _install(module: str, found: type) -> None:
    if module == LORA_LOADER:
        _refuse_serial(found)
        return
    from .loader import install  # takes torch, which `slora --help` does not need

    install(found)


def _refuse_serial(mixin: Any) -> None:
    """Say what a Serial LoRA is loaded with, where diffusers would ask for modules of the pairs' names."""
    load = mixin.load_lora_adapter
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def load_lora_adapter(self: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(source, Mapping) and any(".serial_lora." in str(key) for key in source):
            raise _serial()
        try:
            return load(self, source, *args, **kwargs)
        except ValueError as error:  # PEFT's, of a file that it has opened
            if ".serial_lora." in str(error) and not isinstance(source, Mapping):
                raise _serial() from error
            raise

    mixin.load_lora_adapter = load_lora_adapter


def _serial() -> Exception:
    from .errors import AdapterFileError

    return AdapterFileError(
        "This is a Serial LoRA, not an ordinary LoRA: load it with pipe.load_serial_lora() (or load_serial_lora(model, "
        "...)), or write the ordinary LoRA that it equals with export_lora() or `slora export`, and load that."
    )
