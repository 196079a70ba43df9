"""What PEFT calls things: its LoraConfig as settings of ours, and an answer to those who use its names."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import SerialLoraError
from .records import RECORDS

T = TypeVar("T")

_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}
_ANSWERS = {
    **{theirs: f"{ours}=" for theirs, ours in _NAMES.items()},
    "layers_to_transform": "layers=",
    "exclude_modules": "exclude=, regular expressions of attentions such as r'model\\.layers\\.0\\.self_attn'",
    "init_lora_weights": "init=",
    "target_modules": (
        "inputs=, such as ('hidden_states', 'attention_output'), and targets=, regular expressions of attentions: a "
        "pair sits on what an attention reads and serves its q, k and v together"
    ),
    "task_type": "nothing: the model stays of its own class",
    "bias": "nothing: biases stay frozen",
    "use_dora": "nothing: there is no DoRA of a serial pair",
}
_NOT_CARRIED = (
    *("use_dora", "rank_pattern", "alpha_pattern", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "lora_bias", "exclude_modules", "alora_invocation_tokens", "use_qalora"),
    *("use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)


def answers_peft_names(cls: type[T]) -> type[T]:
    """Let a config that is given PEFT's names say what they are called here."""
    init: Any = cls.__init__

    @functools.wraps(init)
    def checked(self: T, *args: Any, **given: Any) -> None:
        if known := [name for name in given if name in _ANSWERS]:
            answers = "; ".join(f"{name}= of PEFT is {_ANSWERS[name]}" for name in known)
            raise SerialLoraError(f"{answers}. SerialLoraConfig.from_peft(LoraConfig(...)) translates.")
        init(self, *args, **given)

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


def settings_of_peft(config: Any) -> dict[str, Any]:
    """A LoraConfig, or its JSON, as keyword arguments of SerialLoraConfig; warns of what has no counterpart."""
    values = config if isinstance(config, Mapping) else {k: getattr(config, k) for k in vars(config)}
    kind = values.get("peft_type", "LORA")
    if getattr(kind, "value", kind) != "LORA" or "r" not in values:
        raise SerialLoraError(f"from_peft takes a LoraConfig of PEFT; got {type(config).__name__} of {kind}.")
    settings = {ours: values[theirs] for theirs, ours in _NAMES.items() if values.get(theirs) is not None}
    if values.get("layers_to_transform") is not None:
        settings["layers"] = values["layers_to_transform"]
    start = values.get("init_lora_weights")
    if start == "gaussian":
        settings["init"] = "gaussian"
    if values.get("modules_to_save"):
        settings["modules_to_save"] = values["modules_to_save"]
    left_out = [name for name in _NOT_CARRIED if values.get(name)]
    if values.get("bias", "none") != "none":
        left_out.append("bias")
    if isinstance(start, str) and start != "gaussian":
        left_out.append(f"init_lora_weights={start!r}")
    if left_out:
        warnings.warn(f"Of PEFT's config, {', '.join(left_out)} has no counterpart and is left out.", stacklevel=3)
    return settings


def further_pairs(target_modules: Any) -> list[str]:
    """The optional pairs that PEFT's target_modules asks for: those in front of output projections and MLPs."""
    if target_modules is None:
        return []
    every = target_modules == "all-linear"
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    leaves = {name.rpartition(".")[2] for name in names}
    found = {
        pair.name
        for record in RECORDS
        for pairs in record.sites.values()
        for pair in pairs
        if pair.optional and (every or any(p.rpartition(".")[2] in leaves or p in names for p in pair.projections))
    }
    return sorted(found & {"attention_output", "feed_forward"})
