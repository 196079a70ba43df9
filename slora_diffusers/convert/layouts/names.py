"""What projections are called elsewhere: the models' original module names, flattened as kohya's tools write them.

The names are those of the models' first code, which sd-scripts and ComfyUI keep: a LoRA module is `lora_unet_` and
the path with dots turned into underscores. A name that stands for several projections of ours is one Linear there,
their weights stacked in this order.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...core.sites import unwrap
from ...errors import SerialLoraError

Names = Mapping[str, tuple[str, ...]]


def _at(site: str, projections: str) -> tuple[str, ...]:
    return tuple(f"{site}.{projection}" for projection in projections.split())


_QKV, _ADDED_QKV = "to_q to_k to_v", "add_q_proj add_k_proj add_v_proj"
_JOINT, _DOUBLE = "transformer_blocks.{}", "transformer_blocks.{}"
_SINGLE = "single_transformer_blocks.{}"

# {name there: paths here}, `{}` standing for the index of a block.
_KOHYA: dict[str, Names] = {
    "SD3Transformer2DModel": {
        "joint_blocks_{}_x_block_attn_qkv": _at(f"{_JOINT}.attn", _QKV),
        "joint_blocks_{}_x_block_attn_proj": _at(_JOINT, "attn.to_out.0"),
        "joint_blocks_{}_x_block_attn2_qkv": _at(f"{_JOINT}.attn2", _QKV),
        "joint_blocks_{}_x_block_attn2_proj": _at(_JOINT, "attn2.to_out.0"),
        "joint_blocks_{}_context_block_attn_qkv": _at(f"{_JOINT}.attn", _ADDED_QKV),
        "joint_blocks_{}_context_block_attn_proj": _at(_JOINT, "attn.to_add_out"),
        "joint_blocks_{}_x_block_mlp_fc1": _at(_JOINT, "ff.net.0.proj"),
        "joint_blocks_{}_x_block_mlp_fc2": _at(_JOINT, "ff.net.2"),
        "joint_blocks_{}_context_block_mlp_fc1": _at(_JOINT, "ff_context.net.0.proj"),
        "joint_blocks_{}_context_block_mlp_fc2": _at(_JOINT, "ff_context.net.2"),
    },
    "FluxTransformer2DModel": {
        "double_blocks_{}_img_attn_qkv": _at(f"{_DOUBLE}.attn", _QKV),
        "double_blocks_{}_img_attn_proj": _at(_DOUBLE, "attn.to_out.0"),
        "double_blocks_{}_txt_attn_qkv": _at(f"{_DOUBLE}.attn", _ADDED_QKV),
        "double_blocks_{}_txt_attn_proj": _at(_DOUBLE, "attn.to_add_out"),
        "double_blocks_{}_img_mlp_0": _at(_DOUBLE, "ff.net.0.proj"),
        "double_blocks_{}_img_mlp_2": _at(_DOUBLE, "ff.net.2"),
        "double_blocks_{}_txt_mlp_0": _at(_DOUBLE, "ff_context.net.0.proj"),
        "double_blocks_{}_txt_mlp_2": _at(_DOUBLE, "ff_context.net.2"),
        "double_blocks_{}_img_mod_lin": _at(_DOUBLE, "norm1.linear"),
        "double_blocks_{}_txt_mod_lin": _at(_DOUBLE, "norm1_context.linear"),
        "single_blocks_{}_linear1": _at(_SINGLE, "attn.to_q attn.to_k attn.to_v proj_mlp"),
        "single_blocks_{}_linear2": _at(_SINGLE, "proj_out"),
        "single_blocks_{}_modulation_lin": _at(_SINGLE, "norm.linear"),
    },
    "PixArtTransformer2DModel": {
        "blocks_{}_attn_qkv": _at(f"{_JOINT}.attn1", _QKV),
        "blocks_{}_attn_proj": _at(_JOINT, "attn1.to_out.0"),
        "blocks_{}_cross_attn_q_linear": _at(_JOINT, "attn2.to_q"),
        "blocks_{}_cross_attn_kv_linear": _at(f"{_JOINT}.attn2", "to_k to_v"),
        "blocks_{}_cross_attn_proj": _at(_JOINT, "attn2.to_out.0"),
        "blocks_{}_mlp_fc1": _at(_JOINT, "ff.net.0.proj"),
        "blocks_{}_mlp_fc2": _at(_JOINT, "ff.net.2"),
    },
}
# What the tools number the text encoders: CLIP-L, CLIP-G, T5; Flux keeps T5 at 3, where CLIP-G is missing.
_TEXT_ENCODERS = {
    "SD3Transformer2DModel": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"},
    "FluxTransformer2DModel": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te3"},
    "PixArtTransformer2DModel": {"text_encoder": "lora_te1"},
}


def kohya_names(models: Mapping[str, nn.Module]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """{name of a module in kohya's files: (component, paths of the Linears that it stands for)}.

    Args:
        models: {component: model}, the transformer among them.

    Raises:
        SerialLoraError: If the transformer is of a class that has no names there.
    """
    family = next((c for m in models.values() if (c := _family(m)) is not None), None)
    if family is None:
        raise SerialLoraError(
            f"kohya names are known for {', '.join(_KOHYA)}, and {[type(unwrap(m)).__name__ for m in models.values()]} "
            "is not among them. Export with format='diffusers' or format='peft'."
        )
    names: dict[str, tuple[str, tuple[str, ...]]] = {}
    for component, model in models.items():
        linears = linears_of(model)
        if _family(model) is not None:
            for name, paths in _KOHYA[family].items():
                for i in range(_blocks(linears, paths[0])):
                    here = tuple(path.format(i) for path in paths)
                    if all(path in linears for path in here):
                        names[f"lora_unet_{name.format(i)}"] = component, here
        elif component in _TEXT_ENCODERS[family]:
            for path in linears:
                # transformers 5 dropped the level `text_model` from some classes; the files keep it.
                there = f"text_model.{path}" if path.startswith("encoder.layers.") else path
                names[f"{_TEXT_ENCODERS[family][component]}_{there.replace('.', '_')}"] = component, (path,)
    return names


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of everything in a model that a LoRA may sit on: modules with a weight matrix."""
    found = {path.replace("_orig_mod.", ""): m for path, m in unwrap(model).named_modules()}
    return {path: m for path, m in found.items() if isinstance(W := getattr(m, "weight", None), Tensor) and W.ndim >= 2}


def out_features(linear: nn.Module) -> int:
    """Width of what a Linear gives; known also where the stored weight is quantized."""
    known = getattr(linear, "out_features", None) or getattr(linear, "nf", None)  # nf: Conv1D of GPT-2
    return known or linear.weight.shape[0]  # pyright: ignore


def _family(model: nn.Module) -> str | None:
    return next((c.__name__ for c in type(unwrap(model)).__mro__ if c.__name__ in _KOHYA), None)


def _blocks(linears: Mapping[str, nn.Module], path: str) -> int:
    blocks = path.partition(".")[0] + "."
    return 1 + max((int(p.split(".")[1]) for p in linears if p.startswith(blocks)), default=-1)
