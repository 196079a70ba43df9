"""Every transformer of diffusers, tiny and random: no download, a forward in milliseconds.

    model = TINY["WanTransformer3DModel"].build()
    output = model(**TINY["WanTransformer3DModel"].arguments())

Keys are class names; `ClassName/variant` is the same class with another configuration.
"""

from __future__ import annotations

from tests.tiny.audio import AUDIO
from tests.tiny.base import TinyModel, flat_tensors, transformer_classes
from tests.tiny.flux import FLUX
from tests.tiny.image import IMAGE
from tests.tiny.video import VIDEO
from tests.tiny.wan import WAN

__all__ = ["TINY", "TinyModel", "flat_tensors", "transformer_classes"]

TINY: dict[str, TinyModel] = FLUX | IMAGE | WAN | VIDEO | AUDIO

for _key, _tiny in TINY.items():
    _tiny.class_name = _key.partition("/")[0]
