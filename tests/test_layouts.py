"""LoRAs in the wild: what we read of a file is what its trainer meant, and what stock diffusers makes of it."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from slora_diffusers.convert.layouts.read import read_lora
from tests.loras import FAMILIES, LAYOUTS, MIXINS, layouts_of, make_lora, mixin_of
from tests.tiny.models import TINY

pytestmark = pytest.mark.filterwarnings("ignore:The state dict is of PEFT and has no adapter_config.json")

CELLS = [(family, layout) for family in FAMILIES for layout in layouts_of(family)]
OTHERS = [family for family in TINY if "/" not in family and family not in FAMILIES]
CELLS += [(family, layout) for family in OTHERS for layout in ("diffusers", "PEFT", "OneTrainer", "LyCORIS")]


@cache
def built(family):
    """A tiny model that nothing changes: reading a LoRA leaves it alone."""
    return TINY[family].build()


def changes_of(lora, component="transformer"):
    return {path: part.change() for path, part in lora.parts.get(component, {}).items()}


def assert_same(read, wanted):
    assert set(read) == set(wanted)
    for path, dW in wanted.items():
        change = read[path].B.double() @ read[path].A.double().flatten(1)
        assert torch.linalg.norm(change - dW) <= 1e-6 * torch.linalg.norm(dW), path


class Pipeline:
    """As much of a pipeline as a converter needs."""

    def __init__(self, model, mixin):
        self.transformer, self.lora_state_dict = model, mixin.lora_state_dict


@pytest.mark.parametrize(("family", "layout"), CELLS)
def test_every_layout_of_every_family_is_read_whole(family, layout):
    model = built(family)
    tensors, wanted = make_lora(model, LAYOUTS[layout])
    assert len(wanted) >= 8
    mixin = mixin_of(family)
    for pipeline in [None] if mixin is None else [None, Pipeline(model, mixin)]:
        lora = read_lora(tensors, {"transformer": model}, pipeline=pipeline)
        assert not lora.unknown
        assert not lora.rest
        assert not lora.elsewhere
        if pipeline is not None and (family, layout) == ("Flux2Transformer2DModel", "ComfyUI, A and B"):
            # diffusers' converter keeps shift and scale in BFL's order here, and we read what diffusers reads
            lora.parts["transformer"].pop("norm_out.linear")
            wanted.pop("norm_out.linear")
        assert_same(changes_of(lora), wanted)


# {(family, layout): which Linears} of what stock diffusers loads besides its own layouts, at a tiny model's width and
# without leaving a part out, as its converters do with Z-Image's final layer, say.
STOCK = {
    ("FluxTransformer2DModel", "XLabs"): "",
    ("FluxTransformer2DModel", "kohya, musubi-tuner"): r"^transformer_blocks",
    ("FluxTransformer2DModel", "ComfyUI"): r"^transformer_blocks",
    ("Flux2Transformer2DModel", "kohya, musubi-tuner"): r"transformer_blocks",
    ("Flux2Transformer2DModel", "ComfyUI, A and B"): r"transformer_blocks|embed",
    ("ZImageTransformer2DModel", "ai-toolkit"): "",
    ("ZImageTransformer2DModel", "kohya, diffusers' names"): "",
    ("ZImageTransformer2DModel", "kohya, musubi-tuner"): "to_out|feed_forward",
    ("Krea2Transformer2DModel", "ComfyUI, A and B"): "",
    **{
        ("QwenImageTransformer2DModel", layout): ""
        for layout in ("ai-toolkit", "kohya, diffusers' names", "kohya, musubi-tuner", "ComfyUI", "ComfyUI, A and B")
    },
    ("QwenImage21Transformer2DModel", "ComfyUI"): "",
    ("HiDreamImageTransformer2DModel", "ai-toolkit"): "",
    ("ErnieImageTransformer2DModel", "ai-toolkit"): "",
    ("WanTransformer3DModel", "ComfyUI, A and B"): "",
    ("WanTransformer3DModel", "ComfyUI"): "^blocks",
    ("WanTransformer3DModel", "kohya, musubi-tuner"): "^blocks",
    ("SkyReelsV2Transformer3DModel", "kohya, musubi-tuner"): "^blocks",
    ("ChronoEditTransformer3DModel", "ComfyUI, A and B"): "",
    ("LTXVideoTransformer3DModel", "ai-toolkit"): "",
    ("LTX2VideoTransformer3DModel", "ComfyUI, A and B"): "",
    **{
        ("MiniMaxH3Transformer3DModel", layout): "" for layout in ("kohya, musubi-tuner", "ComfyUI", "ComfyUI, A and B")
    },
    **{(family, layout): "" for family in MIXINS for layout in ("diffusers", "diffusers' first")},
}


@pytest.mark.parametrize(("family", "layout"), STOCK)
def test_stock_diffusers_makes_the_same_of_it(family, layout):
    tensors, wanted = make_lora(built(family), LAYOUTS[layout], only=STOCK[family, layout])
    mixin = mixin_of(family)
    assert mixin is not None
    copies = {key: tensor.clone() for key, tensor in tensors.items()}  # converters scale some of them in place
    state, *more = as_tuple(mixin.lora_state_dict(copies))
    model = TINY[family].build()
    model.load_lora_adapter(state, prefix="transformer", network_alphas=next((item for item in more if item), None))
    stock = {
        name: module.get_delta_weight("default_0").double()
        for name, module in model.named_modules()
        if "default_0" in getattr(module, "lora_A", {})
    }
    assert set(stock) == set(wanted)
    for path, dW in wanted.items():
        assert torch.linalg.norm(stock[path] - dW) < 1e-5 * torch.linalg.norm(dW), path
    read = read_lora(tensors, {"transformer": built(family)}, pipeline=Pipeline(model, mixin))
    assert_same(changes_of(read), wanted)


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)
