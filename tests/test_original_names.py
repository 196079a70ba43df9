"""Our tables of original module names, compared with diffusers' own converters of original checkpoints.

A checkpoint under the names of a table, whose rows are numbered, goes through the converter; every Linear has to come
out with the rows that the table gives it. The models are on the meta device, at the widths that converters insist on.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders import single_file_utils

from slora_diffusers.convert.layouts.names import (
    ORIGINALS,
    Place,
    linears_of,
    out_features,
    renamed_path,
    stood_for,
)
from tests.tiny.models import TINY, transformer_classes

# {class: (converter, what its tiny model's config has to be changed to for it)}
JUDGES = {
    "SD3Transformer2DModel": ("sd3_transformer_checkpoint", {}),
    "FluxTransformer2DModel": ("flux_transformer_checkpoint", {"attention_head_dim": 128, "num_attention_heads": 24}),
    "ChromaTransformer2DModel": (
        "chroma_transformer_checkpoint",
        {"attention_head_dim": 128, "num_attention_heads": 24},
    ),
    "Flux2Transformer2DModel": ("flux2_transformer_checkpoint", {}),
    "AuraFlowTransformer2DModel": ("auraflow_transformer_checkpoint", {}),
    "Lumina2Transformer2DModel": (
        "lumina2",
        {"hidden_size": 2304, "num_attention_heads": 24, "num_kv_heads": 8, "axes_dim_rope": (32, 32, 32)},
    ),
    "ZImageTransformer2DModel": ("z_image_transformer_checkpoint", {}),
    "QwenImage21Transformer2DModel": ("qwen_image21_transformer_checkpoint", {}),
    "ErnieImageTransformer2DModel": ("ernie_image_transformer_checkpoint", {}),
    "HiDreamImageTransformer2DModel": ("hidream_transformer", {}),
    "Krea2Transformer2DModel": ("krea2_transformer_checkpoint", {}),
    "WanTransformer3DModel": ("wan_transformer", {}),
    "WanTransformer3DModel/i2v": ("wan_transformer", {}),
    "WanVACETransformer3DModel": ("wan_transformer", {}),
    "WanAnimateTransformer3DModel": ("wan_transformer", {}),
    "HunyuanVideoTransformer3DModel": (
        "hunyuan_video_transformer",
        {"attention_head_dim": 128, "num_attention_heads": 24, "rope_axes_dim": (16, 56, 56)},
    ),
    "MochiTransformer3DModel": ("mochi_transformer_checkpoint", {"num_layers": 48}),
    "LTXVideoTransformer3DModel": ("ltx_transformer_checkpoint", {}),
    "LTX2VideoTransformer3DModel": ("ltx2_transformer", {}),
    "CosmosTransformer3DModel": ("cosmos_transformer_checkpoint", {}),
    "MiniMaxH3Transformer3DModel": ("minimax_h3_transformer_checkpoint", {}),
}
LETS_ALIASES_WIN = {"HunyuanVideoTransformer3DModel": True}  # the converter reads Tencent's own spelling


class Checkpoint(dict):
    """Named weights; whatever else a converter takes is there, too, and of no interest."""

    def __init__(self, weights):
        super().__init__(weights)
        self.taken = set()

    def pop(self, key, *default):
        self.taken.add(key)
        return super().pop(key) if key in self else torch.zeros(12)

    def __getitem__(self, key):
        return super().__getitem__(key) if key in self else torch.zeros(12)


@pytest.mark.parametrize("name", JUDGES)
def test_a_checkpoint_under_the_names_converts_to_the_models_own(name):
    converter, changes = JUDGES[name]
    tiny = TINY[name]
    config = tiny.config | changes
    with torch.device("meta"):
        model = transformer_classes()[tiny.class_name](**config)
    weights, wanted, start = {}, {}, 0
    for there, place in dotted_names(model, LETS_ALIASES_WIN.get(name, False)).items():
        numbers = torch.arange(start, start + place.height, dtype=torch.float64)
        weights |= {f"{there}.weight": numbers[:, None], f"{there}.bias": numbers}
        wanted |= {path: numbers[rows][:, None] for path, rows in place.paths.items()}
        start += place.height
    convert = getattr(single_file_utils, f"convert_{converter}_to_diffusers", None) or getattr(
        single_file_utils, f"convert_{converter}"
    )
    converted = convert(Checkpoint(weights), config=config)
    assert len(wanted) > 20
    wrong = [path for path, rows in wanted.items() if not torch.equal(converted.get(f"{path}.weight", rows * 0), rows)]
    assert not wrong
    left = {path for path, m in linears_of(model).items() if path not in wanted and isinstance(m, torch.nn.Linear)}
    assert not left, "Linears without a name"


def dotted_names(model, aliases_first):
    """{original name with dots: place}, one for each Linear."""
    original, linears = ORIGINALS[type(model).__name__], linears_of(model)
    tables = [original.names, original.aliases]
    found, named = {}, set()
    for table in reversed(tables) if aliases_first else tables:
        for name, place in stood_for(table, "transformer", linears):
            if not set(place.paths) & named:
                found[name], named = place, named | set(place.paths)
    if original.same:
        for path in set(linears) - named:
            rows = torch.arange(out_features(linears[path]))
            found[renamed_path(path, original.renamed)] = Place("transformer", {path: rows})
    return found
