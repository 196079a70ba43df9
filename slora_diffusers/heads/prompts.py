"""Classification by text prompts: the classes' weights are what a CLIP or SigLIP reads in their names.

    model = SerialLoraForPromptClassification.from_clip("openai/clip-vit-base-patch32", ["cat", "dog"], config)
    loss = model(pixel_values, labels=labels).loss

Pairs in one tower or both, trained on a few shots of each class, in the manner of CLIP-LoRA (Zanella and Ben Ayed,
arXiv 2405.18541). There is no head: without an adapter this is the model's own zero-shot classification.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SerialLoraConfig
from ..errors import ArchitectureError, SerialLoraError
from .base import SerialLoraWithHead, open_model
from .deploy import whole_model
from .losses import single_label
from .preprocessing import Preprocessing

TOWERS = {"both": None, "vision": r"vision_model\..*", "text": r"text_model\..*"}
"""Which of the model's sites get a pair, as regular expressions."""


class SerialLoraForPromptClassification(SerialLoraWithHead):
    """logits = scale cos(image features, text features of each class's prompt), by the model's own forward.

    Make one with `from_clip` or `from_pretrained`.
    """

    task = "classification by prompts"

    @classmethod
    def from_clip(
        cls,
        model_or_id: nn.Module | str | os.PathLike[str],
        label_names: Sequence[str],
        config: SerialLoraConfig | None,
        *,
        towers: str = "both",
        template: str = "a photo of a {}.",
        tokenizer: Any = None,
        padding: bool | str = True,
        preprocessing: Preprocessing | None = None,
        **loading: Any,
    ) -> SerialLoraForPromptClassification:
        """Put a new adapter on a model with an image and a text tower.

        Args:
            model_or_id: A CLIP or SigLIP of transformers, or its folder or Hub id.
            label_names: Names of the classes.
            config: The adapter; None adds none.
            towers: Where the pairs go: "both", "vision" or "text".
            template: The prompt; {} stands for the class's name.
            tokenizer: The text tower's tokenizer; by default the one beside the model.
            padding: How prompts are padded; SigLIP was trained with "max_length".
            preprocessing: Size and normalisation of images; by default the model's own.
            **loading: For the model's `from_pretrained`.

        Raises:
            SerialLoraError: If the model has no two towers, or an argument does not fit.
        """
        if towers not in TOWERS or "{}" not in template:
            raise SerialLoraError(
                f"towers must be one of {', '.join(TOWERS)}, and the template hold {{}} for the class's name; got "
                f"{towers!r} and {template!r}."
            )
        if config is not None and TOWERS[towers] is not None:
            if config.targets is not None:
                raise SerialLoraError("Choose sites by towers or by the config's targets, not by both.")
            config = replace(config, targets=TOWERS[towers])
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(_name_of(model_or_id))
        tokens = tokenizer([template.format(name) for name in label_names], padding=padding)
        settings = {
            "template": template,
            "tokens": {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens},
        }
        return cls._from_backbone(model_or_id, None, config, settings, label_names, preprocessing, loading)

    @staticmethod
    def _open(
        model_or_id: nn.Module | str | os.PathLike[str], model_class: str | None = None, **loading: Any
    ) -> nn.Module:
        model = open_model(model_or_id, model_class, **loading)
        if not hasattr(model, "text_model") or not hasattr(model, "vision_model"):
            raise ArchitectureError(
                f"{type(model).__name__} has no text_model and vision_model, as CLIP and SigLIP do."
            )
        return model

    @classmethod
    def _make_head(
        cls, backbone: nn.Module, classes: int, settings: dict[str, Any], preprocessing: Preprocessing
    ) -> nn.Module:
        tokens = _Prompts(settings["tokens"])
        for key, values in tokens().items():
            most = backbone.config.text_config.vocab_size if key == "input_ids" else 2  # pyright: ignore
            if values.ndim != 2 or len(values) != classes or values.dtype != torch.int64 or values.min() < 0:
                raise SerialLoraError(
                    f"{key} must hold whole numbers for each of {classes} prompts, all of one length."
                )
            if values.max() >= most:
                raise SerialLoraError(f"{key} holds {int(values.max())}; the text model knows the tokens below {most}.")
        return tokens

    def to_transformers(self, save_directory: str | os.PathLike[str] | None = None) -> Any:
        """The model that this is, a CLIP or SigLIP, with the adapter fused into a copy of it.

        Args:
            save_directory: Folder to write it to.
        """
        return whole_model(self.backbone, save_directory)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise SerialLoraError unless the vision tower takes images of this height and width: it takes one size."""
        config: Any = self.backbone.config
        side = config.vision_config.image_size
        if size != (side, side):
            raise SerialLoraError(f"A {type(self.backbone).__name__} reads images, or tiles, of {side} x {side} alone.")

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, pixel_mask: Tensor | None = None) -> Any:
        """Logits (B, classes), and the cross-entropy if there are labels.

        Args:
            pixel_values: (B, 3, H, W), as `preprocessing` gives them.
            labels: (B,) class indices.
            pixel_mask: Taken as other heads take it; a CLIP's own pooling has no use for it.

        Returns:
            transformers' `ImageClassifierOutput`.
        """
        from transformers.modeling_outputs import ImageClassifierOutput

        logits = self.backbone(pixel_values=pixel_values, **self.head()).logits_per_image  # (B, classes)
        loss = None if labels is None else single_label(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class _Prompts(nn.Module):
    """The prompts' tokens, on the model's device. They are in the file's header, so that no tokenizer is needed."""

    def __init__(self, tokens: dict[str, list[list[int]]]) -> None:
        super().__init__()
        for key, values in tokens.items():
            self.register_buffer(key, torch.tensor(values), persistent=False)

    def forward(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())  # each (classes, L)


def _name_of(model_or_id: nn.Module | str | os.PathLike[str]) -> str | os.PathLike[str]:
    if not isinstance(model_or_id, nn.Module):
        return model_or_id
    name = getattr(getattr(model_or_id, "config", None), "_name_or_path", None)
    if not name:
        raise SerialLoraError("The model does not say where it came from: pass tokenizer=.")
    return name
