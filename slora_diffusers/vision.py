"""Heads over any vision backbone: image classification and semantic segmentation, adapted by Serial LoRA.

    model = SerialLoraForImageClassification.from_backbone("facebook/dinov2-small", 10, SerialLoraConfig(rank=8))
    loss = model(pixel_values, labels=labels).loss
    model.save_pretrained("digits")  # adapter, head, label names and preprocessing: one small file

The pairs sit in the backbone, so that the file's adapter also loads into a plain backbone with `load_serial_lora`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SerialLoraConfig
from .errors import AdapterFileError, ArchitectureError, SerialLoraError
from .features import last_features, layer_features
from .files import WEIGHT_NAME, AdapterTensors, check_finite, check_hub_arguments, read_adapter
from .fuse import fuse_serial_lora
from .inject import add_serial_lora, unload_serial_lora
from .io import Source, describe_base, load_serial_lora, new_header, serial_lora_state_dict, write_state
from .preprocessing import Preprocessing

POOLINGS = ("cls", "mean", "both")
SEGMENTATION_HEADS = ("linear", "convolutional")
IGNORE_INDEX = 255
"""Label of pixels that count for nothing, as in most segmentation data sets."""


class _SerialLoraWithHead(nn.Module):
    """A backbone, a head over its features, and what goes into their file."""

    task: ClassVar[str]

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        settings: Mapping[str, Any],
        label_names: Sequence[str],
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.settings = dict(settings)
        self.label_names = tuple(label_names)
        self.preprocessing = preprocessing

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the backbone's activations in the backward pass, to save memory."""
        if hasattr(self.backbone, "set_grad_checkpointing"):  # timm
            self.backbone.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]
        else:
            settings = {"use_reentrant": False}  # the reentrant kind needs an input that trains
            self.backbone.gradient_checkpointing_enable(settings)  # pyright: ignore[reportCallIssue]

    def fuse(self) -> nn.Module:
        """Merge the adapter into the backbone for good, `W' = W (I + sBA)`; the model is plain PyTorch from here on.

        Returns:
            The model itself. Save its `state_dict()`, or the backbone with its own `save_pretrained`.
        """
        if getattr(self.backbone, "_serial_lora", None) is not None:
            fuse_serial_lora(self.backbone)
            unload_serial_lora(self.backbone)
        return self

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        weight_name: str = WEIGHT_NAME,
        dtype: torch.dtype | None = None,
        is_main_process: bool = True,
    ) -> Path:
        """Write adapter, head, label names and preprocessing to one file; see `save_serial_lora`.

        Raises:
            AdapterFileError: If a weight is not finite; an earlier file of that name is left as it was.
        """
        if getattr(self.backbone, "_serial_lora", None) is not None:
            adapter = serial_lora_state_dict(self.backbone, adapter_name, "model")
        else:
            adapter = AdapterTensors({}, new_header({}))
        head = {
            "task": self.task,
            "settings": self.settings,
            "label_names": list(self.label_names),
            "preprocessing": self.preprocessing.to_dict(),
            "base": _describe(self.backbone),
        }
        tensors = {**adapter, **{f"head.{key}": tensor for key, tensor in self.head.state_dict().items()}}
        state = AdapterTensors(tensors, {**adapter.metadata, "head": head})
        return write_state(state, save_directory, weight_name, dtype, is_main_process)

    @classmethod
    def _from_backbone(
        cls,
        model_or_id: nn.Module | str | os.PathLike[str],
        num_labels: int | None,
        config: SerialLoraConfig | None,
        settings: dict[str, Any],
        label_names: Sequence[str] | None,
        preprocessing: Preprocessing | None,
        loading: Mapping[str, Any],
    ) -> Any:
        names = tuple(label_names) if label_names is not None else tuple(map(str, range(num_labels or 0)))
        if len(names) < 2 or (num_labels is not None and len(names) != num_labels) or len(set(names)) != len(names):
            raise SerialLoraError(
                f"There must be at least two labels, each of its own name: got num_labels={num_labels} and "
                f"label_names={label_names}."
            )
        backbone = open_backbone(model_or_id, **loading)
        if preprocessing is None:
            preprocessing = Preprocessing.of(model_or_id if not isinstance(model_or_id, nn.Module) else backbone)
        head = cls._make_head(backbone, len(names), settings, preprocessing)
        if config is not None:
            add_serial_lora(backbone, config)
        else:
            backbone.requires_grad_(False)
        return cls(backbone, head, settings, names, preprocessing)

    @classmethod
    def _make_head(
        cls, backbone: nn.Module, classes: int, settings: dict[str, Any], preprocessing: Preprocessing
    ) -> Any:
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls, source: Source, backbone: nn.Module | str | os.PathLike[str] | None = None, **arguments: Any
    ) -> Any:
        """Open what `save_pretrained` wrote, over the base that it was trained on.

        Args:
            source: File, folder or Hub id.
            backbone: The base, or its folder or Hub id; by default the one that the file names.
            **arguments: `weight_name`, `subfolder`, `revision`, ... of the file; the rest goes to the backbone's
                `from_pretrained`.

        Raises:
            AdapterFileError: If the file holds no head for this task, or names no base that can be opened.
        """
        hub = {key: arguments.pop(key) for key in list(arguments) if _is_hub_argument(key)}
        tensors = read_adapter(source, **hub)
        saved = tensors.metadata.get("head")
        if not saved or saved.get("task") != cls.task:
            raise AdapterFileError(
                f"{source} holds {'a head for ' + saved['task'] if saved else 'no head'}, and {cls.__name__} needs one "
                f"for {cls.task}. An adapter alone goes into a backbone with load_serial_lora()."
            )
        base = saved["base"]
        if backbone is None and not base["name"]:
            raise AdapterFileError(f"{source} does not say where its {base['class']} came from: pass backbone=.")
        opened = open_backbone(base["name"] if backbone is None else backbone, model_class=base["class"], **arguments)
        preprocessing = Preprocessing.from_dict(saved["preprocessing"])
        head = cls._make_head(opened, len(saved["label_names"]), saved["settings"], preprocessing)
        _load_head(head, tensors)
        if tensors.component_names():
            load_serial_lora(opened, tensors)
        else:
            opened.requires_grad_(False)
        return cls(opened, head, saved["settings"], saved["label_names"], preprocessing).eval()


class SerialLoraForImageClassification(_SerialLoraWithHead):
    """A linear classifier over an adapted backbone: logits = W pool(features) + b.

    Make one with `from_backbone` or `from_pretrained`.
    """

    task = "image classification"

    @classmethod
    def from_backbone(
        cls,
        model_or_id: nn.Module | str | os.PathLike[str],
        num_labels: int | None,
        config: SerialLoraConfig | None,
        *,
        pooling: str = "cls",
        label_names: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        **loading: Any,
    ) -> SerialLoraForImageClassification:
        """Put a new head, and a new adapter, on a backbone. Both are trainable, the base is frozen.

        Args:
            model_or_id: A headless model of transformers or timm, or the folder or Hub id of one of transformers.
            num_labels: Number of classes; None if `label_names` are given.
            config: The adapter; None adds none (training the head alone, or another adapter of your own).
            pooling: What the head reads: "cls" token, "mean" of the patches, or "both" side by side.
            label_names: Names of the classes; 0, 1, ... by default.
            preprocessing: Size and normalisation of images; by default what the backbone was pretrained with.
            **loading: For the backbone's `from_pretrained`; `dtype` is float32 by default.

        Raises:
            SerialLoraError: If labels or pooling do not fit, or no record covers the backbone.
        """
        if pooling not in POOLINGS:
            raise SerialLoraError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}.")
        settings = {"pooling": pooling}
        return cls._from_backbone(model_or_id, num_labels, config, settings, label_names, preprocessing, loading)

    @classmethod
    def _make_head(
        cls, backbone: nn.Module, classes: int, settings: dict[str, Any], preprocessing: Preprocessing
    ) -> nn.Module:
        token, patches = _probe(backbone, preprocessing, last_features)
        features = pool(token, patches, settings["pooling"])  # (1, d)
        head = nn.Linear(features.shape[1], classes)
        nn.init.zeros_(head.weight)  # so that the first step's gradient, not chance, chooses the direction
        nn.init.zeros_(head.bias)
        return head

    def features(self, pixel_values: Tensor) -> Tensor:
        """What the head reads: (B, d), or (B, 2 d) with pooling "both"."""
        token, patches = last_features(self.backbone, pixel_values)  # (B, d), (B, d, h, w)
        return pool(token, patches, self.settings["pooling"])

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        """Logits (B, classes), and the cross-entropy if there are labels.

        Args:
            pixel_values: (B, 3, H, W), as `preprocessing` gives them.
            labels: (B,) class indices, or (B, classes) probabilities.

        Returns:
            transformers' `ImageClassifierOutput`.
        """
        from transformers.modeling_outputs import ImageClassifierOutput

        x = self.features(pixel_values)  # (B, d)
        logits = self.head(x.to(_dtype(self.head)))  # (B, classes)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class SerialLoraForSemanticSegmentation(_SerialLoraWithHead):
    """Per-pixel classes from the patch features of an adapted backbone.

    Make one with `from_backbone` or `from_pretrained`.
    """

    task = "semantic segmentation"

    @classmethod
    def from_backbone(
        cls,
        model_or_id: nn.Module | str | os.PathLike[str],
        num_labels: int | None,
        config: SerialLoraConfig | None,
        *,
        head: str = "linear",
        layers: Sequence[int] | None = None,
        width: int = 128,
        label_names: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        **loading: Any,
    ) -> SerialLoraForSemanticSegmentation:
        """Put a new head, and a new adapter, on a backbone. Both are trainable, the base is frozen.

        Args:
            model_or_id: As for classification.
            num_labels: Number of classes, background included; None if `label_names` are given.
            config: The adapter; None adds none.
            head: "linear" on the last features, or "convolutional" over several layers (`ConvolutionalHead`).
            layers: Blocks (of hierarchical backbones: stages) that the convolutional head reads, from 0; by default
                four, evenly spread.
            width: Channels of the convolutional head.
            label_names: Names of the classes; 0, 1, ... by default.
            preprocessing: As for classification.
            **loading: As for classification.

        Raises:
            SerialLoraError: If labels, head or layers do not fit, or no record covers the backbone.
        """
        if head not in SEGMENTATION_HEADS or width < 1 or (head == "linear" and layers is not None):
            raise SerialLoraError(
                f"head must be one of {', '.join(SEGMENTATION_HEADS)}, width at least 1, and layers go with the "
                f"convolutional head only; got head={head!r}, width={width}, layers={layers}."
            )
        settings = {"head": head, "layers": None if layers is None else list(layers), "width": width}
        return cls._from_backbone(model_or_id, num_labels, config, settings, label_names, preprocessing, loading)

    @classmethod
    def _make_head(
        cls, backbone: nn.Module, classes: int, settings: dict[str, Any], preprocessing: Preprocessing
    ) -> nn.Module:
        if settings["head"] == "linear":
            return nn.Conv2d(_probe(backbone, preprocessing, last_features)[1].shape[1], classes, 1)
        maps = _probe(backbone, preprocessing, layer_features)
        if settings["layers"] is None:
            settings["layers"] = sorted({len(maps) * (i + 1) // 4 - 1 for i in range(4)} - {-1})
        chosen = _probe(backbone, preprocessing, partial(layer_features, layers=settings["layers"]))
        return ConvolutionalHead([x.shape[1] for x in chosen], settings["width"], classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        """Logits (B, classes, H, W) at the size of the input, and the cross-entropy if there are labels.

        Args:
            pixel_values: (B, 3, H, W).
            labels: (B, H, W) class indices; pixels of 255 count for nothing.

        Returns:
            transformers' `SemanticSegmenterOutput`.
        """
        from transformers.modeling_outputs import SemanticSegmenterOutput

        dtype = _dtype(self.head)
        if self.settings["head"] == "linear":
            x = self.head(last_features(self.backbone, pixel_values)[1].to(dtype))  # (B, classes, h, w)
        else:
            maps = layer_features(self.backbone, pixel_values, self.settings["layers"])
            x = self.head([x.to(dtype) for x in maps])  # (B, classes, 4 h, 4 w)
        logits = F.interpolate(x.float(), pixel_values.shape[-2:], mode="bilinear")  # (B, classes, H, W)
        loss = None if labels is None else F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
        return SemanticSegmenterOutput(loss=loss, logits=logits)


class ConvolutionalHead(nn.Module):
    """Levels norm'd, projected and summed, then two steps of convolution and upsampling by 2.

    The sum over layers is SETR-MLA's, the progressive upsampling SETR-PUP's (Zheng et al., arXiv 2012.15840).
    """

    def __init__(self, widths: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Sequential(_Norm(d), nn.Conv2d(d, width, 1)) for d in widths)
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), _Norm(width), nn.GELU()) for _ in range(2)
        )
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, d_i, h_i, w_i) -> logits (B, classes, 4 h, 4 w), with h and w of the finest level."""
        size = max((x.shape[-2:] for x in maps), key=lambda s: s[0])
        levels = [level(x) for level, x in zip(self.levels, maps, strict=True)]
        x = sum(F.interpolate(y, size, mode="bilinear") for y in levels)  # (B, width, h, w)
        for step in self.steps:
            x = F.interpolate(step(x), scale_factor=2, mode="bilinear")
        return self.classifier(x)


class _Norm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, d, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def pool(token: Tensor | None, patches: Tensor, pooling: str) -> Tensor:
    """One vector per image: the class token (B, d), the mean of the patches (B, d), or both (B, 2 d).

    Raises:
        SerialLoraError: If the backbone has no class token and the pooling needs one.
    """
    mean = patches.mean((2, 3))
    if pooling == "mean":
        return mean
    if token is None:
        raise SerialLoraError(f'The backbone has no class token, which pooling={pooling!r} reads: use pooling="mean".')
    return token if pooling == "cls" else torch.cat([token, mean], dim=1)


def open_backbone(
    model_or_id: nn.Module | str | os.PathLike[str], model_class: str | None = None, **loading: Any
) -> nn.Module:
    """A headless vision backbone; of a model with a text tower too, its vision tower.

    Raises:
        SerialLoraError: If there is no such model.
    """
    if isinstance(model_or_id, nn.Module):
        model = model_or_id
    else:
        import transformers

        opener = getattr(transformers, model_class or "", transformers.AutoModel)
        try:
            model = opener.from_pretrained(model_or_id, **{"dtype": torch.float32, **loading})
        except (OSError, ValueError) as error:
            raise SerialLoraError(f"{str(model_or_id)!r} is no model that transformers can open: {error}") from error
    tower = getattr(model, "vision_model", None) if hasattr(model, "text_model") else None
    return tower if isinstance(tower, nn.Module) else model


def _describe(backbone: nn.Module) -> dict[str, str | None]:
    try:
        return describe_base(backbone)
    except ArchitectureError:  # no record covers it, so it has no adapter: a head alone needs none
        name = getattr(getattr(backbone, "config", None), "_name_or_path", None) or None
        return {"class": type(backbone).__name__, "name": name, "fingerprint": None}


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _is_hub_argument(name: str) -> bool:
    try:
        check_hub_arguments({name: None})
    except TypeError:
        return False
    return True


def _probe(backbone: nn.Module, preprocessing: Preprocessing, features: Any) -> Any:
    """The features of one black image: their widths and number are the backbone's own business."""
    like = next(backbone.parameters())
    with torch.no_grad():
        return features(backbone, torch.zeros(1, 3, *preprocessing.size, dtype=like.dtype, device=like.device))


def _load_head(head: nn.Module, tensors: AdapterTensors) -> None:
    state = {key.removeprefix("head."): tensor for key, tensor in tensors.items() if key.startswith("head.")}
    check_finite(state)
    wanted = {key: tuple(tensor.shape) for key, tensor in head.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if wanted != given:
        wrong = sorted(set(wanted.items()) ^ set(given.items()))[:4]
        raise AdapterFileError(
            f"The file's head does not fit the backbone: {wrong} differ. Pass the base it was made for."
        )
    head.load_state_dict(state)
