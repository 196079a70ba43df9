"""Segmentation by points and boxes: a SAM whose image encoder is adapted, and whose mask decoder may train along.

    model = SerialLoraForPromptableSegmentation.from_sam("facebook/sam-vit-base", SerialLoraConfig(rank=4))
    loss = model(pixel_values, masks=masks, input_boxes=boxes).loss

The manner is SAMed's (Zhang and Liu, arXiv 2304.13785), with serial pairs for its LoRA. For classes instead of prompts,
put `SerialLoraForSemanticSegmentation` on the image encoder (`SamVisionModel`).
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import SerialLoraConfig
from ..errors import ArchitectureError
from .base import SerialLoraWithHead, open_model
from .deploy import whole_model
from .framing import check_framed, check_pixel_mask
from .losses import check_masks, mask_loss
from .preprocessing import Preprocessing


class SerialLoraForPromptableSegmentation(SerialLoraWithHead):
    """A SAM or SAM 2: masks of what points and boxes show, by the model's own forward.

    Make one with `from_sam` or `from_pretrained`.
    """

    task = "promptable segmentation"
    label_arguments = ("masks",)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # A SAM has its embedding of positions under two names; a state dict to be written to a file has it under one.
        self.register_state_dict_post_hook(_drop_twins)
        self.register_load_state_dict_pre_hook(_give_twins)

    @classmethod
    def from_sam(
        cls,
        model_or_id: nn.Module | str | os.PathLike[str],
        config: SerialLoraConfig | None,
        *,
        decoder: str = "trained",
        preprocessing: Preprocessing | None = None,
        **loading: Any,
    ) -> SerialLoraForPromptableSegmentation:
        """Put a new adapter on the image encoder; prompt encoder and base stay frozen.

        Args:
            model_or_id: A `SamModel` or `Sam2Model` of transformers, or its folder or Hub id.
            config: The adapter; None adds none.
            decoder: Whether the mask decoder is "trained", and saved in the file, or stays "frozen".
            preprocessing: Size and normalisation of images; by default the model's own.
            **loading: For the model's `from_pretrained`.

        Raises:
            SerialLoraError: If the model has no mask decoder, or an argument does not fit.
        """
        if decoder not in ("trained", "frozen"):
            raise ArchitectureError(f"decoder must be trained or frozen; got {decoder!r}.")
        names = ("background", "object")
        model = cls._from_backbone(model_or_id, None, config, {"decoder": decoder}, names, preprocessing, loading)
        model.head.requires_grad_(True)  # after the adapter froze the whole base
        return model

    @staticmethod
    def _open(
        model_or_id: nn.Module | str | os.PathLike[str], model_class: str | None = None, **loading: Any
    ) -> nn.Module:
        model = open_model(model_or_id, model_class, **loading)
        if not isinstance(getattr(model, "mask_decoder", None), nn.Module):
            raise ArchitectureError(f"{type(model).__name__} has no mask_decoder, as SAM and SAM 2 do.")
        return model

    @classmethod
    def _make_head(
        cls, backbone: nn.Module, classes: int, settings: dict[str, Any], preprocessing: Preprocessing
    ) -> nn.Module:
        # The decoder is the model's own, seen from here too: what trains is what the model's forward uses.
        return backbone.get_submodule("mask_decoder") if settings["decoder"] == "trained" else nn.Identity()

    def to_transformers(self, save_directory: str | os.PathLike[str] | None = None) -> Any:
        """The model that this is, a SAM, with the adapter fused into a copy of it.

        Args:
            save_directory: Folder to write it to.
        """
        return whole_model(self.backbone, save_directory)

    def forward(
        self,
        pixel_values: Tensor,
        masks: Tensor | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_boxes: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """The model's output, with `loss` (binary cross-entropy plus soft Dice) if there are masks.

        Args:
            pixel_values: (B, 3, H, W).
            masks: What each prompt shows: (B, prompts, h, w) of 0 and 1, at any size. Of padded images they lie over
                the input as the images do.
            input_points: (B, prompts, points, 2), in pixels of the model's input.
            input_labels: (B, prompts, points): 1 for a point on the object, 0 for one beside it.
            input_boxes: (B, prompts, 4), left, top, right, bottom in pixels.
            pixel_mask: (B, H, W), 1 on the image and 0 on its padding, which counts for nothing in the loss.
            **more: Further arguments of the model.

        Returns:
            The model's own output; `pred_masks` are logits (B, prompts, 1, h', w').
        """
        prompts = {"input_points": input_points, "input_labels": input_labels, "input_boxes": input_boxes, **more}
        output = self.backbone(pixel_values=pixel_values, multimask_output=False, **prompts)
        if masks is not None:
            check_masks(masks, *output.pred_masks.shape[:2])
            check_framed(masks, pixel_values, self.preprocessing.pads or pixel_mask is not None)
            logits = F.interpolate(output.pred_masks[:, :, 0].float(), masks.shape[-2:], mode="bilinear")
            counted = None
            if pixel_mask is not None:
                check_pixel_mask(pixel_mask, pixel_values)
                counted = F.interpolate(pixel_mask[:, None].to(logits), masks.shape[-2:], mode="nearest")
            output["loss"] = mask_loss(logits, masks.to(logits), counted)
        return output

    @torch.no_grad()
    def predict(
        self,
        image: Any,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_boxes: Tensor | None = None,
    ) -> Tensor:
        """Logits of what prompts show in a PIL image of any size, (prompts, height, width) at its own size.

        Args:
            image: The image.
            input_points: (prompts, points, 2), x and y in pixels of the image.
            input_labels: (prompts, points): 1 for a point on the object, 0 for one beside it.
            input_boxes: (prompts, 4), left, top, right, bottom in pixels of the image.
        """
        like = next(self.backbone.parameters())
        pixels, frame = self.preprocessing.framed(image)

        def placed(points: Tensor | None) -> Tensor | None:
            if points is None:
                return None
            return frame.points(points.float().unflatten(-1, (-1, 2))).flatten(-2)[None].to(like)

        points, boxes = placed(input_points), placed(input_boxes)
        labels = None if input_labels is None else input_labels[None].to(like.device)
        output = self(pixels[None].to(like), None, points, labels, boxes)
        return frame.restore(output.pred_masks[0, :, 0].float()).cpu()


def _twins(module: nn.Module) -> dict[str, str]:
    """{second name of a tensor: its first name}."""
    first: dict[int, str] = {}
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: first[id(tensor)] for name, tensor in named if first.setdefault(id(tensor), name) != name}


def _drop_twins(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for name in _twins(module):
        state.pop(prefix + name, None)


def _give_twins(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, first in _twins(module).items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])
