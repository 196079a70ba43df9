"""The settings of one adapter: a frozen dataclass that goes into the adapter's file as JSON."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .core.pair import check_init
from .core.patterns import LONGEST, check_patterns, matches
from .errors import SerialLoraError
from .peft_names import answers_peft_names, further_pairs, settings_of_peft

LARGEST_RANK = 2**16
MOST_ENTRIES = 4096


@answers_peft_names
@dataclass(frozen=True)
class SerialLoraConfig:
    """Settings of one Serial LoRA adapter: `x~ = (I + s B A) x` with `s = alpha / r`.

    Args:
        rank: Rank r of every pair.
        alpha: Numerator of the scale s; `None` means each pair's own rank, so that s = 1.
        dropout: Probability of dropping an element of the pair's input while training, in [0, 1).
        inputs: Names of the inputs that get a pair, e.g. `("hidden_states", "attention_output")`; `None` takes all
            that the architecture's record names, without the optional ones.
        targets: Regular expression(s) of the sites to adapt, anchored at both ends; `None` takes all.
        exclude: Regular expression(s) of the sites to leave out, anchored at both ends.
        layers: Index or indices of the blocks to adapt (the first number in a site's path); `None` takes all.
        rank_pattern: {regular expression of a site, or of one pair `<site>.serial_lora.<pair>`: rank}, overriding
            `rank` there; the first match counts.
        alpha_pattern: {regular expression of a site: alpha}, overriding `alpha` there; the first match counts.
        rslora: Scale by alpha / sqrt(r) instead (rank-stabilised, arXiv 2312.03732).
        init: Start of A: "kaiming" (uniform, a = sqrt(5), as LoRA's), "gaussian" (N(0, 1 / r)), or "gradient", which
            `initialize_serial_lora` finds (until then A is "kaiming", and recorded so). B is zero.
        modules_to_save: Modules that train whole beside the pairs, such as a classifier, as PEFT's: the paths of them,
            or the last parts of their paths. The adapter has a copy of each, which is saved, loaded and swapped with
            it, and stands in the module's place while the adapter is active; weights other than 0 do not scale it.

    Raises:
        SerialLoraError: If a value is out of range or a regular expression does not compile.

    Source: Zhong et al., Serial Low-rank Adaptation of Vision Transformer, arXiv 2503.17750.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    inputs: Sequence[str] | None = None
    targets: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    layers: int | Sequence[int] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    init: str = "kaiming"
    modules_to_save: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise SerialLoraError(
                    f"{name} must map regular expressions of sites to numbers; got {getattr(self, name)!r}."
                )
        for name, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise SerialLoraError(f"rank must be a whole number of at least 1; got {rank!r} for {name!r}.")
            if rank > LARGEST_RANK:
                raise SerialLoraError(f"rank must be at most {LARGEST_RANK}; got {rank!r} for {name!r}.")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if alpha is not None and not is_number(alpha):
                raise SerialLoraError(f"alpha must be a finite number or None; got {alpha!r} for {name!r}.")
        if not is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise SerialLoraError(f"dropout must lie in [0, 1); got {self.dropout!r}.")
        if not isinstance(self.rslora, bool):
            raise SerialLoraError(f"rslora must be True or False; got {self.rslora!r}.")
        check_init(self.init)
        for name, kind in {
            "inputs": str,
            "targets": str,
            "exclude": str,
            "modules_to_save": str,
            "layers": int,
        }.items():
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name), kind))
        if any(not name or len(name) > LONGEST for name in self.modules_to_save or ()):
            raise SerialLoraError(
                f"modules_to_save must name modules, each by at most {LONGEST} letters; got {self.modules_to_save!r}."
            )
        patterns = (*(self.targets or ()), *(self.exclude or ()), *self.rank_pattern, *self.alpha_pattern)
        check_patterns(patterns, "The config")

    def selects(self, path: str) -> bool:
        """Whether the site at `path` is among `targets` and `layers`, and not in `exclude`."""
        if self.targets is not None and not any(matches(pattern, path) for pattern in self.targets):
            return False
        if self.exclude is not None and any(matches(pattern, path) for pattern in self.exclude):
            return False
        return not isinstance(self.layers, tuple) or block_index(path) in self.layers

    def rank_of(self, *names: str) -> int:
        """Rank r of a pair that goes by these names: the path of its site, and its own key if it has one."""
        ranks = (rank for pattern, rank in self.rank_pattern.items() if any(matches(pattern, name) for name in names))
        return next(ranks, self.rank)

    def scaling_of(self, path: str, rank: int | None = None) -> float:
        """Scale s of the pairs at the site `path`: alpha / r, or alpha / sqrt(r) with `rslora`."""
        rank = self.rank_of(path) if rank is None else rank
        alpha = next((a for pattern, a in self.alpha_pattern.items() if matches(pattern, path)), self.alpha)
        alpha = rank if alpha is None else alpha
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values; `from_dict` reads them back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_peft(cls, config: Any, inputs: Sequence[str] | None = None) -> SerialLoraConfig:
        """The settings of a LoraConfig of PEFT: rank, alpha, dropout, rslora, layers.

        Its target_modules are Linears; a pair sits on what an attention reads, before q, k and v together. So they are
        not translated, but where they name more than that a warning says which `inputs` reach it.

        Args:
            config: A `peft.LoraConfig`, or the JSON of an adapter_config.json.
            inputs: As for the config itself; None takes what the architecture's record names.

        Raises:
            SerialLoraError: If it is the config of another method.
        """
        settings = settings_of_peft(config)
        targets = config.get("target_modules") if isinstance(config, Mapping) else config.target_modules
        if inputs is None and (further := further_pairs(targets)):
            warnings.warn(
                f"target_modules={targets!r} reaches more than the attentions' inputs. To adapt that too, pass inputs= "
                f"with {' and '.join(map(repr, further))} beside 'hidden_states'.",
                stacklevel=2,
            )
        return cls(**settings, inputs=inputs)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SerialLoraConfig:
        """Build a config from `to_dict`'s values. Fields that this version does not know are warned of and dropped."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            warnings.warn(
                f"SerialLoraConfig does not know {', '.join(unknown)}: the file was written by a newer version of "
                f"slora_diffusers, and these settings are ignored.",
                stacklevel=2,
            )
        return cls(**{key: value for key, value in values.items() if key in known})


def _as_tuple(name: str, value: Any, kind: type) -> tuple[Any, ...] | None:
    """None, or one or several values of a kind as a tuple."""
    if value is None:
        return None
    values = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else (value,)
    if len(values) > MOST_ENTRIES:
        raise SerialLoraError(f"{name} has {len(values):,} entries; it may have {MOST_ENTRIES:,}.")
    if not all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in values):
        raise SerialLoraError(f"{name} must be None, or one or several of {kind.__name__}; got {values!r}.")
    return values


def is_number(value: object) -> bool:
    """Whether a value is a number that a float can hold: no truth value, not NaN, not infinite, not beyond 1e308."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def block_index(path: str) -> int | None:
    """The first number among the components of a site's path: the index of its block."""
    return next((int(part) for part in path.split(".") if part.isdecimal() and len(part) < 10), None)
