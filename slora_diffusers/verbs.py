"""`DiffusionPipeline` gets the verbs as soon as there is one.

Importing diffusers' pipelines takes seconds (transformers, PEFT and every quantizer that is installed), and who adapts
a bare model needs none of them. So `import slora_diffusers` does not import them: it waits for whoever does.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

MODULE = "diffusers.pipelines.pipeline_utils"


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds the module as the other finders do, and installs the verbs once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != MODULE:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if module.__name__ == MODULE:  # some loaders serve several modules
                    _install(module.DiffusionPipeline)

            spec.loader.exec_module = exec_module
        return spec


def give_verbs() -> None:
    """Give `DiffusionPipeline` the verbs of `SerialLoraLoaderMixin`: now, or when diffusers defines it."""
    module = sys.modules.get(MODULE)
    if pipeline_class := getattr(module, "DiffusionPipeline", None):
        _install(pipeline_class)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _install(pipeline_class: type) -> None:
    from .loader import install  # takes torch, which `slora --help` does not need

    install(pipeline_class)
