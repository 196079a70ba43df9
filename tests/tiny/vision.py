"""Vision transformers and CLIP's text towers, tiny and random: transformers, timm and PyTorch itself, no download."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from tests.tiny.base import Draw, flat_tensors

SIZE, PATCH = 16, 4
_IMAGE = {"image_size": SIZE, "patch_size": PATCH}
_VIT = {
    **_IMAGE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_CLIP_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 12,
    "bos_token_id": 0,
    "eos_token_id": 49,
    "pad_token_id": 1,
    "projection_dim": 16,
}
_STAGES = {"depths": [1, 1], "num_attention_heads": [1, 2]}
_SWIN = {**_IMAGE, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 2}
_SAM = {**_VIT, "output_channels": 16, "mlp_dim": 24, "window_size": 2, "global_attn_indexes": [1]}
_SAM.pop("intermediate_size")


@dataclass(frozen=True)
class TinyVision:
    """How to build a model, and the keyword arguments of one forward."""

    make: Callable[[], nn.Module]
    inputs: Callable[[Draw], dict[str, Any]]

    def build(self, seed: int = 0) -> Any:
        """A model in eval mode whose weights follow from the seed; none is zero, which would hide an adapter."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = self.make().eval().requires_grad_(False)
            for parameter in filter(torch.numel, model.parameters()):
                if parameter.ndim > 1:
                    parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
                elif not parameter.any():
                    parameter.normal_(std=0.1)
                elif parameter.abs().max() < 0.1:  # layer scale, which starts at 1e-5 in some models
                    parameter.fill_(0.5)
        return model

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of one forward, the same for the same seed."""
        return self.inputs(Draw(seed))

    @torch.no_grad()
    def run(self, model: nn.Module, seed: int = 0) -> Tensor:
        """Every tensor of one forward's output, flattened into one."""
        output = model(**self.arguments(seed))
        return torch.cat([tensor.flatten() for tensor in flat_tensors(output) if tensor.is_floating_point()])


def pixels(draw: Draw) -> dict[str, Any]:
    return {"pixel_values": draw(2, 3, SIZE, SIZE)}


def tokens(draw: Draw) -> dict[str, Any]:
    return {"input_ids": draw.ints(48, 2, 7)}


def _frames(draw: Draw) -> dict[str, Any]:
    return {"pixel_values": draw(2, 4, 3, SIZE, SIZE)}


def _patches(draw: Draw) -> dict[str, Any]:
    """What SigLIP 2 reads: flat patches, which of them count, and how many there are each way."""
    side = SIZE // 4
    return {
        "pixel_values": draw(2, side * side, 3 * 4 * 4),
        "pixel_attention_mask": torch.ones(2, side * side, dtype=torch.long),
        "spatial_shapes": torch.tensor([[side, side]] * 2),
    }


def _both(draw: Draw) -> dict[str, Any]:
    return {**tokens(draw), **pixels(draw)}


def hugging_face(name: str, config: dict[str, Any], inputs: Callable[[Draw], dict[str, Any]] = pixels) -> TinyVision:
    def make() -> nn.Module:
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(**config))

    return TinyVision(make, inputs)


_INTERPOLATION = ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")


class _StandIn(types.ModuleType):
    """A module of torchvision that is not there: whatever is asked of it is an empty class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type[nn.Module]:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {mode: mode for mode in _INTERPOLATION})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@cache
def timm() -> types.ModuleType:
    """timm, which imports torchvision for transforms and data sets that its models do not use."""
    if importlib.util.find_spec("timm") is None:  # where the Makefile puts it
        sys.path.append(str(Path(sys.prefix) / "timm"))
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        return importlib.import_module("timm")
    finally:  # so that nobody else takes the stand-in for the real one
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def _timm(name: str, **config: Any) -> TinyVision:
    def make() -> nn.Module:
        classes = {key: getattr(timm().models.vision_transformer, config[key]) for key in config if key == "block_fn"}
        return timm().create_model(name, img_size=SIZE, num_classes=5, **{**config, **classes})

    return TinyVision(make, lambda draw: {"x": draw(2, 3, SIZE, SIZE)})


class TwoAttentions(nn.Module):
    """Self-attention on one sequence, then attention from it to another of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 2, kdim=12, vdim=20, batch_first=True)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.cross(x, key, value)[0]


def _audio_and_video() -> nn.Module:
    """Meta's Perception Encoder: the encoders of sound and of frames, and the one over both."""
    tower = {**_VIT, "num_key_value_heads": 2, "head_dim": 8}
    frames = transformers.ViTConfig(**_VIT, id2label={i: str(i) for i in range(8)})
    dac = {"encoder_hidden_size": 4, "downsampling_ratios": [2, 4], "codebook_dim": 8, "hidden_size": 16}
    config = transformers.PeAudioVideoEncoderConfig(
        **tower, audio_config={**tower, "dac_config": dac}, video_config={**tower, "vision_config": frames}
    )
    return transformers.PeAudioVideoEncoder(config)


_SMALL = {"patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2}

VISION: dict[str, TinyVision] = {
    "ViTModel": hugging_face("ViTModel", _VIT),
    "ViTForImageClassification": hugging_face("ViTForImageClassification", _VIT),
    "DeiTForImageClassificationWithTeacher": hugging_face("DeiTForImageClassificationWithTeacher", _VIT),
    "BeitForImageClassification": hugging_face(
        "BeitForImageClassification", {**_VIT, "use_relative_position_bias": True, "layer_scale_init_value": 0.5}
    ),
    "Dinov2Model": hugging_face("Dinov2Model", {**_VIT, "mlp_ratio": 2}),
    "Dinov2Backbone": hugging_face("Dinov2Backbone", {**_VIT, "out_indices": [1, 2]}),
    "Dinov2Model/swiglu": hugging_face("Dinov2Model", {**_VIT, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    "Dinov2ForImageClassification": hugging_face("Dinov2ForImageClassification", {**_VIT, "mlp_ratio": 2}),
    "Dinov2WithRegistersModel": hugging_face("Dinov2WithRegistersModel", {**_VIT, "num_register_tokens": 2}),
    "DINOv3ViTModel": hugging_face("DINOv3ViTModel", {**_VIT, "num_register_tokens": 2}),
    "DINOv3ViTModel/gated": hugging_face("DINOv3ViTModel", {**_VIT, "use_gated_mlp": True}),
    "ViTMAEForPreTraining": hugging_face(
        "ViTMAEForPreTraining",
        {**_VIT, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
        lambda draw: {**pixels(draw), "noise": torch.arange(16.0).expand(2, -1).cos()},
    ),
    "ViTMSNModel": hugging_face("ViTMSNModel", _VIT),
    "IJepaModel": hugging_face("IJepaModel", _VIT),
    "CLIPVisionModel": hugging_face("CLIPVisionModel", _VIT),
    "CLIPTextModel": hugging_face("CLIPTextModel", _CLIP_TEXT, tokens),
    "CLIPTextModelWithProjection": hugging_face("CLIPTextModelWithProjection", _CLIP_TEXT, tokens),
    "CLIPModel": hugging_face("CLIPModel", {"text_config": _CLIP_TEXT, "vision_config": _VIT}, _both),
    "SiglipVisionModel": hugging_face("SiglipVisionModel", _VIT),
    "SiglipTextModel": hugging_face("SiglipTextModel", _CLIP_TEXT, tokens),
    "SiglipForImageClassification": hugging_face(
        "SiglipForImageClassification", {"text_config": _CLIP_TEXT, "vision_config": _VIT}
    ),
    "Siglip2VisionModel": hugging_face(
        "Siglip2VisionModel", {**_VIT, "num_patches": (SIZE // 4) ** 2, "patch_size": 4}, _patches
    ),
    "SamVisionModel": hugging_face("SamVisionModel", _SAM),
    "SamHQVisionModel": hugging_face("SamHQVisionModel", _SAM),
    "Sam2VisionModel": hugging_face(
        "Sam2VisionModel",
        {
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "image_size": [64, 64],
                "hidden_size": 8,
                "num_attention_heads": 1,
                "patch_kernel_size": [3, 3],
                "patch_stride": [2, 2],
                "patch_padding": [1, 1],
                "window_positional_embedding_background_size": [2, 2],
                "blocks_per_stage": [1, 2, 1, 1],
                "embed_dim_per_stage": [8, 16, 24, 32],
                "num_attention_heads_per_stage": [1, 2, 2, 2],
                "window_size_per_stage": [4, 4, 4, 4],
                "global_attention_blocks": [2],
            },
            "backbone_channel_list": [32, 24, 16, 8],
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "fpn_hidden_size": 16,
        },
        lambda draw: {"pixel_values": draw(2, 3, 64, 64)},
    ),
    "SwinForImageClassification": hugging_face("SwinForImageClassification", _SWIN),
    "Swinv2ForImageClassification": hugging_face("Swinv2ForImageClassification", _SWIN),
    "VideoMAEModel": hugging_face("VideoMAEModel", {**_VIT, "num_frames": 4}, _frames),
    "VJEPA2ForVideoClassification": hugging_face(
        "VJEPA2ForVideoClassification",
        {
            "crop_size": SIZE,
            "patch_size": PATCH,
            "frames_per_clip": 4,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "pred_hidden_size": 24,
            "pred_num_attention_heads": 2,
            "pred_num_hidden_layers": 1,
            "pred_num_mask_tokens": 2,
            "num_pooler_layers": 1,
        },
        lambda draw: {"pixel_values_videos": draw(2, 4, 3, SIZE, SIZE)},
    ),
    "VJEPA2Model": hugging_face(
        "VJEPA2Model",
        {
            "crop_size": SIZE,
            "patch_size": PATCH,
            "frames_per_clip": 4,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "pred_hidden_size": 24,
            "pred_num_attention_heads": 2,
            "pred_num_hidden_layers": 1,
            "pred_num_mask_tokens": 2,
        },
        lambda draw: {"pixel_values_videos": draw(1, 4, 3, SIZE, SIZE)},
    ),
    "OwlViTModel": hugging_face("OwlViTModel", {"text_config": _CLIP_TEXT, "vision_config": _VIT}, _both),
    "Owlv2Model": hugging_face("Owlv2Model", {"text_config": _CLIP_TEXT, "vision_config": _VIT}, _both),
    "Aimv2VisionModel": hugging_face("Aimv2VisionModel", _VIT),
    "SegformerForSemanticSegmentation": hugging_face(
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
    ),
    "PeAudioVideoEncoder": TinyVision(
        _audio_and_video,
        lambda draw: {"input_values": draw(1, 1, 64), "pixel_values_videos": draw(1, 8, 3, SIZE, SIZE)},
    ),
    "timm/pe": _timm("vit_pe_core_tiny_patch16_384", **_SMALL),
    "timm/vit": _timm("vit_tiny_patch16_224", **_SMALL),
    "timm/vit_reg4_dinov2": _timm("vit_small_patch14_reg4_dinov2", **_SMALL),
    "timm/deit_distilled": _timm("deit_tiny_distilled_patch16_224", **_SMALL),
    "timm/parallel": _timm("vit_tiny_patch16_224", **_SMALL, block_fn="ParallelThingsBlock"),
    "timm/eva02": _timm("eva02_tiny_patch14_224", **_SMALL),
    "timm/beit": _timm("beit_base_patch16_224", **_SMALL),
    "timm/relpos": _timm("vit_relpos_small_patch16_224", **_SMALL),
    "timm/sam": _timm("samvit_base_patch16", **_SMALL, neck_chans=8, global_attn_indexes=(1,), window_size=2),
    "timm/naflex": _timm("naflexvit_base_patch16_gap", patch_size=PATCH, embed_dim=16, depth=2, num_heads=2),
    "timm/swin": _timm(
        "swin_tiny_patch4_window7_224", patch_size=2, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=2
    ),
    "timm/swinv2": _timm(
        "swinv2_tiny_window8_256", patch_size=2, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=2
    ),
    "nn.MultiheadAttention": TinyVision(
        TwoAttentions, lambda draw: {"x": draw(2, 6, 16), "key": draw(2, 5, 12), "value": draw(2, 5, 20)}
    ),
    "nn.TransformerEncoder": TinyVision(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2, enable_nested_tensor=False
        ),
        lambda draw: {"src": draw(2, 6, 16)},
    ),
}
