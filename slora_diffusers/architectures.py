"""Where serial pairs sit: one record per family of models, matched by class name and importing nothing.

A *site* is a module whose forward reads the tensors to adapt, almost always an attention. A *pair* belongs to one
site, transforms one or more of its inputs and feeds the named projections. Inject, fuse, export, counting and the
tests are all driven by these records; `register_architecture` adds one for a model of your own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import ArchitectureError

OPTIONAL_PAIRS = ("attention_output", "encoder_attention_output", "feed_forward", "encoder_feed_forward")
"""Pairs that records name but that are off unless `config.inputs` asks for them."""


@dataclass(frozen=True)
class Pair:
    """One low-rank pair of a site.

    Args:
        inputs: Arguments of the site's forward that go through the pair, all of one width d. Empty for a pair that
            reads what its only projection reads, wherever that comes from (the optional pairs).
        projections: Linear submodules of the site, by path, that read these inputs and nothing else. Those that a
            given model does not have (`add_q_proj` of a block without text queries) are passed over.
        name: Name in files and in `config.inputs`; by default the first input.
    """

    inputs: tuple[str, ...]
    projections: tuple[str, ...]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.inputs[0])

    @property
    def optional(self) -> bool:
        """Whether the pair is made only when `config.inputs` names it."""
        return self.name in OPTIONAL_PAIRS


@dataclass(frozen=True)
class Architecture:
    """A family of models that share module names.

    Args:
        family: Name shown in tables.
        models: Class names of the models; subclasses match too, and so do models that contain one as a submodule.
        sites: Path of the site inside the model, `*` standing for one path component -> its pairs.
        note: What a user should know, shown in the table of supported architectures.
    """

    family: str
    models: tuple[str, ...]
    sites: Mapping[str, tuple[Pair, ...]] = field(hash=False)
    note: str = ""


def _output(projection: str, name: str = "attention_output") -> Pair:
    return Pair((), (projection,), name)


# The pairs that most families are made of.
ATTENTION_OUTPUT = _output("to_out.0")
SELF = (Pair(("hidden_states",), ("to_q", "to_k", "to_v")), ATTENTION_OUTPUT)
CROSS = (
    Pair(("hidden_states",), ("to_q",)),
    Pair(("encoder_hidden_states",), ("to_k", "to_v")),
    ATTENTION_OUTPUT,
)
JOINT = (
    Pair(("hidden_states",), ("to_q", "to_k", "to_v")),
    Pair(("encoder_hidden_states",), ("add_q_proj", "add_k_proj", "add_v_proj")),
    ATTENTION_OUTPUT,
    _output("to_add_out", "encoder_attention_output"),
)
FEED_FORWARD = (_output("net.0.proj", "feed_forward"),)
ENCODER_FEED_FORWARD = (_output("net.0.proj", "encoder_feed_forward"),)

ARCHITECTURES: dict[str, Architecture] = {}
"""Model class name -> its record."""

REFUSED: dict[str, str] = {}
"""Model class name -> why no pair can serve it exactly."""


def register_architecture(record: Architecture) -> Architecture:
    """Add a record for a family of models, or replace the one its class names have.

    Args:
        record: The family's class names and sites.

    Returns:
        The record, so that the call can stand where it is defined.

    Raises:
        ArchitectureError: If the record names no model, no site, or a site without a pair.
    """
    if not record.models or not record.sites or not all(record.sites.values()):
        raise ArchitectureError(
            f"The record {record.family!r} needs at least one model class name and one site, and every site a pair; "
            f"got models={record.models!r}, sites={dict(record.sites)!r}."
        )
    for model in record.models:
        ARCHITECTURES[model] = record
    return record


for _record in (
    Architecture(
        "DiT",
        ("DiTTransformer2DModel",),
        {"transformer_blocks.*.attn1": SELF, "transformer_blocks.*.ff": FEED_FORWARD},
    ),
    Architecture(
        "PixArt-alpha / Sigma",
        ("PixArtTransformer2DModel",),
        {
            "transformer_blocks.*.attn1": SELF,
            "transformer_blocks.*.attn2": CROSS,
            "transformer_blocks.*.ff": FEED_FORWARD,
        },
    ),
    Architecture(
        "Stable Diffusion 3 / 3.5",
        ("SD3Transformer2DModel",),
        {
            "transformer_blocks.*.attn": JOINT,
            "transformer_blocks.*.attn2": SELF,
            "transformer_blocks.*.ff": FEED_FORWARD,
            "transformer_blocks.*.ff_context": ENCODER_FEED_FORWARD,
        },
    ),
    Architecture(
        "Flux.1",
        ("FluxTransformer2DModel",),
        {
            "transformer_blocks.*.attn": JOINT,
            "transformer_blocks.*.ff": FEED_FORWARD,
            "transformer_blocks.*.ff_context": ENCODER_FEED_FORWARD,
            # Not proj_mlp: it reads the same tensor, but outside the attention.
            "single_transformer_blocks.*.attn": SELF,
        },
    ),
):
    register_architecture(_record)
