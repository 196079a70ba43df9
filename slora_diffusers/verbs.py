"""`DiffusionPipeline` and `ModularPipeline` get the verbs as soon as they are there.

Importing diffusers' pipelines takes seconds (transformers, PEFT and every quantizer that is installed), and who adapts
a bare model needs none of them. So `import slora_diffusers` does not import them: it waits for whoever does.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

CLASSES = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}
"""{module: its class that gets the verbs}."""


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
                    _install(getattr(module, CLASSES[fullname]))

            spec.loader.exec_module = exec_module
        return spec


def give_verbs() -> None:
    """Give diffusers' pipelines the verbs of `SerialLoraLoaderMixin`: now, or when diffusers defines them."""
    for module, name in CLASSES.items():
        if pipeline_class := getattr(sys.modules.get(module), name, None):
            _install(pipeline_class)
    if not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _install(pipeline_class: type) -> None:
    from .loader import install  # takes torch, which `slora --help` does not need

    install(pipeline_class)
