"""A backbone, a head and the one file that holds the adapter in the one and the weights of the other."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.fuse import fuse_serial_lora
from ..adapters.lifecycle import add_serial_lora, unload_serial_lora
from ..config import SerialLoraConfig
from ..core.components import has_adapters
from ..core.state import parameters_of, registry_of
from ..errors import AdapterFileError, AdapterStateError, ArchitectureError, SerialLoraError
from ..files.fingerprint import describe_base, warn_of_other_base
from ..files.format import AdapterFile, Base, Head
from ..files.load import Source, load_serial_lora
from ..files.save import adapter_file
from ..files.storage import WEIGHT_NAME, check_finite, check_hub_arguments
from .backbones import patch_size
from .deploy import no_class_for
from .predict import predictions
from .preprocessing import Preprocessing

LARGEST_SETTING = 2**20
"""Of the numbers in a file's settings; token ids are the largest."""


class SerialLoraWithHead(nn.Module):
    """A backbone, a head over its features, and what goes into their file."""

    task: ClassVar[str]
    adapted_part: ClassVar[str] = "backbone"  # what add_serial_lora, serial_lora_scale, ... work on
    label_arguments: ClassVar[tuple[str, ...]] = ("labels",)  # of forward, for transformers' Trainer
    of_pixels: ClassVar[bool] = False  # whether the logits are a map over the input

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
        if any(module is head for module in backbone.modules()):
            self.__dict__["head"] = head  # a part of the backbone: its weights have one name, not two
        else:
            self.head = head
        self.settings = dict(settings)
        self.label_names = tuple(label_names)
        self.preprocessing = preprocessing
        self._fused = False
        self.needs: str | None = None  # a file beside this model's own, with an adapter of another kind

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the backbone's activations in the backward pass, to save memory."""
        checkpoint_gradients(self.backbone)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """The same, by the name that the Trainer of transformers 4 calls."""
        self.enable_gradient_checkpointing()

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """The same, by the name that transformers' Trainer calls, with its options where the backbone has them."""
        enable = getattr(self.backbone, "activation_checkpointing_enable", None)
        if enable is None:
            self.enable_gradient_checkpointing()
        else:
            enable(activation_checkpointing_kwargs, **options)

    def predict(self, image: Any) -> Tensor:
        """Logits of a PIL image of any size, prepared (stretched, padded, cropped, in tiles) as `preprocessing` says.

        Args:
            image: A PIL image.

        Returns:
            (classes,), or of a segmentation (classes, height, width) at the image's own size; in fp32 on the CPU.
        """
        return next(predictions(self, [image]))

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise SerialLoraError unless the model takes inputs, or tiles, of this height and width."""
        patch = patch_size(self.backbone) or 1
        if min(size) < 1 or size[0] % patch or size[1] % patch:
            raise SerialLoraError(
                f"An input, or a tile, must be a multiple of the model's patch, {patch} pixels; got {size}."
            )

    def fuse(self) -> nn.Module:
        """Merge the adapter into the backbone for good, `W' = W (I + sBA)`; the model is plain PyTorch from here on.

        Returns:
            The model itself. Save its `state_dict()`, or the backbone with its own `save_pretrained`.
        """
        if has_adapters(self.backbone):
            fuse_serial_lora(self.backbone)
            unload_serial_lora(self.backbone)
            self._fused = True
        return self

    def to_transformers(self, save_directory: str | os.PathLike[str] | None = None) -> Any:
        """A plain model of transformers with the adapter fused into it, where it has a class for the task.

        Args:
            save_directory: Folder to write it to.

        Raises:
            SerialLoraError: If transformers has no such class.
        """
        raise no_class_for(self.task)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        weight_name: str = WEIGHT_NAME,
        dtype: torch.dtype | None = None,
        is_main_process: bool = True,
    ) -> Path:
        """Write adapter, head, label names and preprocessing to one file.

        Args:
            save_directory: Folder, made if it is not there.
            adapter_name: Which adapter; `None` takes the only one, or the only active one.
            weight_name: Name of the file.
            dtype: Of the adapter's tensors; `None` leaves them as they are.
            is_main_process: Whether this process writes.

        Raises:
            AdapterFileError: If a weight is not finite; an earlier file of that name is left as it was.
            AdapterStateError: If the adapter was fused: a file of the head alone would lack it.
        """
        if self._fused:
            raise AdapterStateError(
                "The adapter is fused into the backbone, which this file does not hold: save before fuse(), or save "
                "model.state_dict(), or model.backbone with its own save_pretrained."
            )
        file = AdapterFile({})
        if has_adapters(self.backbone):
            file = adapter_file(self.backbone, adapter_name, "model")
            if any(weight != 1 for weight in registry_of(self.backbone).active.values()):
                warnings.warn("Adapters have weights other than 1, which files do not hold.", stacklevel=2)
        head = Head(
            self.task,
            self.settings,
            self.label_names,
            self.preprocessing.to_dict(),
            _describe(self.backbone),
            self.needs,
            self.head.state_dict(),
        )
        return file.with_head(head).write(save_directory, weight_name, dtype, is_main_process)

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
        fewest: int = 2,
    ) -> Any:
        names = tuple(label_names) if label_names is not None else tuple(map(str, range(num_labels or 0)))
        other = num_labels is not None and len(names) != num_labels
        if len(names) < fewest or other or len(set(names)) != len(names):
            raise SerialLoraError(
                f"There must be at least {'two labels, each' if fewest == 2 else 'one label,'} of its own name: got "
                f"num_labels={num_labels} and label_names={label_names}."
            )
        backbone = cls._open(model_or_id, **loading)
        if preprocessing is None:
            preprocessing = Preprocessing.of(model_or_id if not isinstance(model_or_id, nn.Module) else backbone)
        head = cls._make_head(backbone, len(names), settings, preprocessing)
        if config is not None:
            add_serial_lora(backbone, config)
        else:
            backbone.requires_grad_(False)
        return cls(backbone, head, settings, names, preprocessing)

    @staticmethod
    def _open(
        model_or_id: nn.Module | str | os.PathLike[str], model_class: str | None = None, **loading: Any
    ) -> nn.Module:
        return open_backbone(model_or_id, model_class, **loading)

    @classmethod
    def _make_head(
        cls, backbone: nn.Module, classes: int, settings: dict[str, Any], preprocessing: Preprocessing
    ) -> Any:
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls, source: Source, backbone: nn.Module | str | os.PathLike[str] | None = None, **arguments: Any
    ) -> Any:
        """Open what `save_pretrained` wrote, over the base that it was trained on, in eval mode.

        Adapter and head are trainable, the base is frozen, as after `from_backbone`.

        Args:
            source: File, folder or Hub id.
            backbone: The base, or its folder or Hub id; by default the one that the file names.
            **arguments: `weight_name`, `subfolder`, `revision`, ... of the file; the rest goes to the backbone's
                `from_pretrained`.

        Raises:
            AdapterFileError: If the file holds no head for this task, or names no base that can be opened.
        """
        hub = {key: arguments.pop(key) for key in list(arguments) if _is_hub_argument(key)}
        file = AdapterFile.read(source, **hub)
        saved = file.head
        if saved is None or saved.task != cls.task:
            raise AdapterFileError(
                f"{source} holds {'a head for ' + saved.task if saved else 'no head'}, and {cls.__name__} needs one "
                f"for {cls.task}. An adapter alone goes into a backbone with load_serial_lora()."
            )
        base = saved.base
        if saved.needs and not isinstance(backbone, nn.Module):
            raise AdapterFileError(
                f"The head of {source} was trained over the adapter in {saved.needs}, which is not Serial LoRA: "
                "pass backbone=, a model that has it, or use pipelines/classify_images.py or segment_images.py."
            )
        if backbone is None:
            backbone = _beside(source, base.name)
        if backbone is None:
            raise AdapterFileError(f"{source} does not say where its {base.kind} came from: pass backbone=.")
        opened = cls._open(backbone, model_class=base.kind, **arguments)
        if has_adapters(opened):
            raise AdapterStateError(
                "The backbone has a Serial LoRA adapter already: pass the base, as it was trained on."
            )
        preprocessing = Preprocessing.from_dict(saved.preprocessing)
        head = cls._head_of(source, saved, opened, preprocessing)
        state = _head_state(head, saved)
        if file.components:
            load_serial_lora(opened, file)
        else:
            warn_of_other_base("head", base, _describe(opened), stacklevel=2)
        head.load_state_dict(state)  # last: a decoder is part of the base, and nothing changes if the file does not fit
        opened.requires_grad_(False)
        for trained in (*parameters_of(opened), *head.parameters()):
            trained.requires_grad_(True)
        return cls(opened, head, saved.settings, saved.label_names, preprocessing).eval()

    @classmethod
    def _head_of(cls, source: Source, saved: Head, backbone: nn.Module, preprocessing: Preprocessing) -> Any:
        """The untrained head that a file describes; its settings may be anything."""
        check_numbers(saved.settings)
        try:
            return cls._make_head(backbone, len(saved.label_names), dict(saved.settings), preprocessing)
        except SerialLoraError:
            raise
        except Exception as error:
            raise AdapterFileError(
                f"{source} is damaged: its settings {dict(saved.settings)} make no head for {cls.task} over a "
                f"{type(backbone).__name__} ({type(error).__name__}: {error})."
            ) from error


def check_numbers(settings: Any) -> None:
    """Raise AdapterFileError if a number in a file's settings is so large that making a head of it takes long."""
    values = settings.values() if isinstance(settings, Mapping) else settings if isinstance(settings, list) else ()
    for value in values:
        if isinstance(value, int | float) and not abs(value) <= LARGEST_SETTING:
            raise AdapterFileError(f"The head's settings hold {value!r}; at most {LARGEST_SETTING} is read.")
        check_numbers(value)


def checkpoint_gradients(model: Any) -> None:
    """Recompute a model's activations in the backward pass, by the name that its library has for it."""
    if hasattr(model, "enable_gradient_checkpointing"):  # diffusers, and a backbone with a head
        model.enable_gradient_checkpointing()
    elif hasattr(model, "set_grad_checkpointing"):  # timm
        model.set_grad_checkpointing()
    else:  # transformers; the reentrant kind needs an input that trains
        model.gradient_checkpointing_enable({"use_reentrant": False})


def open_backbone(
    model_or_id: nn.Module | str | os.PathLike[str], model_class: str | None = None, **loading: Any
) -> nn.Module:
    """A headless vision backbone; of a model with a text tower too, its vision tower, of a SAM its image encoder.

    Raises:
        SerialLoraError: If there is no such model.
    """
    model = open_model(model_or_id, model_class, **loading)
    towers = {"text_model": "vision_model", "mask_decoder": "vision_encoder"}  # what stands beside: CLIP, SAM
    tower: Any = next((getattr(model, part, None) for beside, part in towers.items() if hasattr(model, beside)), None)
    if not isinstance(tower, nn.Module):
        return model
    config: Any = tower.config
    if not getattr(config, "_name_or_path", ""):  # so that a file can name where it came from
        config._name_or_path = getattr(getattr(model, "config", None), "_name_or_path", "")
    return tower


def open_model(
    model_or_id: nn.Module | str | os.PathLike[str], model_class: str | None = None, **loading: Any
) -> nn.Module:
    """A model of transformers, opened as `model_class` (by default as AutoModel does), or the one that is given.

    Raises:
        SerialLoraError: If there is no such model.
    """
    if isinstance(model_or_id, nn.Module):
        return model_or_id
    import transformers

    loading = {"dtype": torch.float32, **loading, "output_loading_info": True}
    try:
        auto = transformers.AutoModel
        for opener in dict.fromkeys((getattr(transformers, model_class or "", auto), auto)):
            model, report = opener.from_pretrained(model_or_id, **loading)
            if len(report["missing_keys"]) < len(model.state_dict()):  # a part of a model may not find its weights
                return model
    except (OSError, ValueError) as error:
        raise SerialLoraError(f"{str(model_or_id)!r} is not a model that transformers can open: {error}") from error
    raise SerialLoraError(f"{str(model_or_id)!r} holds none of the weights of a {type(model).__name__}.")


def _describe(backbone: nn.Module) -> Base:
    try:
        return describe_base(backbone)
    except ArchitectureError:  # no record covers it, so it has no adapter: a head alone needs none
        name = getattr(getattr(backbone, "config", None), "_name_or_path", None) or None
        return Base(type(backbone).__name__, name)


def _beside(source: Source, name: str | None) -> str | None:
    """Where the base is: one whose name begins with ./ lies beside the file."""
    if name is None or not name.startswith("./"):
        return name or None
    path = Path(source) if isinstance(source, str | os.PathLike) else Path()
    return str((path if path.is_dir() else path.parent) / name)


def _is_hub_argument(name: str) -> bool:
    try:
        check_hub_arguments({name: None})
    except TypeError:
        return False
    return True


def _head_state(head: nn.Module, saved: Head) -> dict[str, Tensor]:
    state = dict(saved.tensors)
    check_finite(state)
    wanted = {key: tuple(tensor.shape) for key, tensor in head.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if wanted != given:
        wrong = sorted(set(wanted.items()) ^ set(given.items()))[:4]
        raise AdapterFileError(
            f"The file's head does not fit the backbone: {wrong} differ. Pass the base it was made for."
        )
    return state


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype that a module computes in: its parameters', or fp32 where they are packed (PyTorch's dynamic int8)."""
    parameter = next(module.parameters(), None)
    return torch.float32 if parameter is None else parameter.dtype


def probe(backbone: nn.Module, preprocessing: Preprocessing, features: Any) -> Any:
    """The features of one black image: their widths and number are the backbone's own business."""
    like = next(backbone.parameters())
    with torch.no_grad():
        return features(backbone, torch.zeros(1, 3, *preprocessing.size, dtype=like.dtype, device=like.device))
