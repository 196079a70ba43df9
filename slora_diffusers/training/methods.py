"""What a run trains: Serial LoRA, PEFT's LoRA at the same rank, or every weight. Each attaches and saves itself."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from accelerate.logging import get_logger
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..adapters.contexts import disable_serial_lora
from ..adapters.lifecycle import add_serial_lora
from ..config import SerialLoraConfig
from ..core.processes import whole
from ..core.sites import find_slots
from ..errors import SerialLoraError
from ..files.format import AdapterFile
from ..files.save import adapter_file
from ..heads.base import checkpoint_gradients
from .init_from import start_from, start_of

if TYPE_CHECKING:
    from .options import BaseOptions

logger: Any = get_logger(__name__)
Models = Mapping[str, nn.Module]  # by the name of the pipeline's component
LORA_WEIGHT_NAME = "pytorch_lora_weights.safetensors"


class Adapter(Protocol):
    """One way to adapt the components of a pipeline."""

    def check(self) -> None:
        """Raise SerialLoraError if a package is missing."""
        ...

    def attach(self, model: nn.Module, config: SerialLoraConfig) -> str:
        """Make a model's adapter (or all of it) trainable, the rest frozen; says what was made."""
        ...

    def disabled(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Inside, the model computes without what was made trainable.

        Raises:
            SerialLoraError: If there is no base to go back to.
        """
        ...

    def save(self, models: Models, folder: Path, is_main_process: bool = True) -> Path:
        """Write what was trained; every process calls, one writes. Returns the file or folder."""
        ...


def attach(
    model: nn.Module, options: BaseOptions, method: Adapter | None = None, component: str = "transformer"
) -> None:
    """Add what a run trains to a model, and freeze the rest of it.

    Args:
        model: The model.
        options: They choose the adapter and its settings.
        method: What attaches; that of --adapter by default.
        component: The model's name in an adapter's file.

    Raises:
        SerialLoraError: If the config fits no part of the model, or --init_from does not fit it.
    """
    config, part = start_of(options, component)
    logger.info((method or ADAPTERS[options.adapter]).attach(model, config))
    if part is not None:
        assert options.init_from is not None
        start_from(part, model, options.init_from)
        logger.info("%s starts from %s", component, options.init_from)
    model.train()
    if options.gradient_checkpointing:
        checkpoint_gradients(model)


@contextmanager
def without_adapter(method: Adapter, models: Models) -> Iterator[None]:
    """Inside, the models compute as they did before the run adapted them.

    Raises:
        SerialLoraError: If every weight trains, so that there is no base left.
    """
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(method.disabled(model))
        yield


class SerialLora:
    """This library's adapter."""

    def check(self) -> None:
        pass

    def attach(self, model: nn.Module, config: SerialLoraConfig) -> str:
        return str(add_serial_lora(model, config))

    def disabled(self, model: nn.Module) -> AbstractContextManager[Any]:
        return disable_serial_lora(model)

    def save(self, models: Models, folder: Path, is_main_process: bool = True) -> Path:
        parts = [adapter_file(model, component=name) for name, model in models.items()]
        return AdapterFile.merge(parts).write(folder, is_main_process=is_main_process)


class PeftLora:
    """PEFT's LoRA on the q, k, v and output projections: what Serial LoRA is measured against."""

    def check(self) -> None:
        if importlib.util.find_spec("peft") is None:
            raise SerialLoraError("--adapter lora needs the package peft: pip install peft.")

    def attach(self, model: nn.Module, config: SerialLoraConfig) -> str:
        from peft import LoraConfig, inject_adapter_in_model

        self.check()
        model.requires_grad_(False)
        alpha = config.rank if config.alpha is None else config.alpha
        settings = LoraConfig(
            r=config.rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  PEFT takes any number
            lora_dropout=config.dropout,
            use_rslora=config.rslora,
            init_lora_weights="gaussian" if config.init == "gaussian" else True,
            target_modules=lora_targets(model),
            exclude_modules=list(config.exclude) if config.exclude else None,
        )
        inject_adapter_in_model(settings, model)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        return f"PEFT LoRA: {_count(model):,} parameters"

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def save(self, models: Models, folder: Path, is_main_process: bool = True) -> Path:
        from peft import get_peft_model_state_dict

        tensors, settings = {}, {}
        for name, model in models.items():
            state = {key: whole(tensor) for key, tensor in get_peft_model_state_dict(model).items()}
            tensors.update({f"{name}.{key}": tensor.detach().cpu().contiguous() for key, tensor in state.items()})
            own = model.peft_config["default"].to_dict()  # type: ignore[index,union-attr]
            settings.update({f"{name}.{key}": sorted(v) if isinstance(v, set) else v for key, v in own.items()})
        path = folder / LORA_WEIGHT_NAME
        if is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, default=str)}
            save_file(tensors, path, metadata=metadata)
        return path

    def load(self, model: nn.Module, path: Path, component: str = "model") -> None:
        """Put what `save` wrote for one component into its model, whose base it is frozen on.

        Raises:
            SerialLoraError: If the file does not fit the model.
        """
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

        self.check()
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
            names = [name for name in file.keys() if name.startswith(f"{component}.")]  # noqa: SIM118
            tensors = {name.removeprefix(f"{component}."): file.get_tensor(name) for name in names}
        own = {k.removeprefix(f"{component}."): v for k, v in metadata.items() if k.startswith(f"{component}.")}
        known = {f.name for f in fields(LoraConfig) if f.init}
        inject_adapter_in_model(LoraConfig(**{k: v for k, v in own.items() if k in known}), model)
        unexpected = set_peft_model_state_dict(model, tensors).unexpected_keys
        if unexpected or not tensors:
            raise SerialLoraError(
                f"{path} does not fit {type(model).__name__}: {list(unexpected)[:4] or 'it is empty'}."
            )


class EveryWeight:
    """Full fine-tuning."""

    def check(self) -> None:
        pass

    def attach(self, model: nn.Module, config: SerialLoraConfig) -> str:
        model.requires_grad_(True)
        return f"full fine-tuning: {_count(model):,} parameters"

    def disabled(self, model: nn.Module) -> AbstractContextManager[Any]:
        raise SerialLoraError("--adapter full changes the base itself, and this objective needs it: train an adapter.")

    def save(self, models: Models, folder: Path, is_main_process: bool = True) -> Path:
        for name, model in models.items():
            state = {key: whole(tensor) for key, tensor in model.state_dict().items()}
            if is_main_process:
                model.save_pretrained(folder / name, state_dict=state)  # type: ignore[operator]
        return folder


class HeadAlone:
    """Nothing in the backbone: the head of a vision model trains on the features that there are."""

    def check(self) -> None:
        pass

    def attach(self, model: nn.Module, config: SerialLoraConfig) -> str:
        model.requires_grad_(False)
        return "head alone"

    def disabled(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def save(self, models: Models, folder: Path, is_main_process: bool = True) -> Path:
        return folder


ADAPTERS: dict[str, Adapter] = {"serial": SerialLora(), "lora": PeftLora(), "full": EveryWeight(), "head": HeadAlone()}


def lora_targets(model: nn.Module) -> list[str]:
    """Paths of the q, k, v and output projections of every attention that a record covers."""
    slots = [s for s in find_slots(model) if not s.pair.optional or s.pair.name.endswith("attention_output")]
    linears = [(slot.path, p) for slot in slots for p in slot.projections if isinstance(p.owner, nn.Linear)]
    return sorted({f"{path}.{projection.name}" for path, projection in linears})


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
