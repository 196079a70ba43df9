"""What a record is made of, and the pairs and block layouts that many families share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ArchitectureError

OPTIONAL_PAIRS = ("attention_output", "encoder_attention_output", "feed_forward", "encoder_feed_forward")
"""Pairs that records name but that are off unless `config.inputs` asks for them."""


@dataclass(frozen=True)
class Pair:
    """One low-rank pair of a site.

    Args:
        inputs: Arguments of the site's forward that go through the pair, all of one width d. Empty for a pair that
            reads what its projections read, wherever that comes from (after a norm inside the attention, say): it is
            then computed in front of each of them.
        projections: Linear submodules of the site, by path, that read these inputs; nothing else may. Those that a
            given model does not have (`add_q_proj` of a block without text queries) are skipped.
        name: Name in files and in `config.inputs`; by default the first input.
        without: A submodule; sites that have it pass this pair over.
    """

    inputs: tuple[str, ...]
    projections: tuple[str, ...]
    name: str = ""
    without: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", names("inputs of a Pair", self.inputs, '("hidden_states",)'))
        object.__setattr__(self, "projections", names("projections of a Pair", self.projections, '("to_q", "to_k")'))
        if not self.projections or not (self.name or self.inputs):
            raise ArchitectureError(f"A Pair needs a projection at least, and an input or a name; got {self}.")
        if not self.name:
            object.__setattr__(self, "name", self.inputs[0])
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ArchitectureError(f"The name of a Pair is part of names in files: letters, digits and _; got {self}.")

    @property
    def optional(self) -> bool:
        """Whether the pair is made only when `config.inputs` names it."""
        return self.name in OPTIONAL_PAIRS


Sites = Mapping[str, tuple[Pair, ...]]


def names(what: str, given: Any, example: str) -> tuple[str, ...]:
    """Names as a tuple; a string alone would be taken for its letters.

    Raises:
        ArchitectureError: If they are no tuple or list of names.
    """
    if not isinstance(given, tuple | list) or not all(isinstance(name, str) and name.strip() for name in given):
        raise ArchitectureError(f"The {what} must be a tuple of names, such as {example}; got {given!r}.")
    return tuple(given)


@dataclass(frozen=True)
class Architecture:
    """A family of models that share module names.

    Args:
        family: Name shown in tables.
        models: Class names of the models; subclasses match too, and so do models that contain one as a submodule.
        sites: Path of the site inside the model, `*` standing for one path component -> its pairs. Of two pairs of
            one name at one site the first that applies counts.
        note: What a user should know, shown in the table of supported architectures.
        requires: {key of the model's config: value} without which the sites read something else; models of another
            config are refused.
    """

    family: str
    models: tuple[str, ...]
    sites: Sites = field(hash=False)
    note: str = ""
    requires: Mapping[str, object] = field(default_factory=dict, hash=False)


def reads(projections: str, *inputs: str, name: str = "", without: str = "") -> Pair:
    """A pair from `inputs` to the projections, given as one string: `reads("to_k to_v", "encoder_hidden_states")`."""
    return Pair(inputs, tuple(projections.split()), name, without)


def output(projection: str, name: str = "attention_output") -> tuple[Pair, ...]:
    """An optional pair in front of one Linear."""
    return (Pair((), (projection,), name),)


def cross(
    q: str, kv: str, out: str, *, hidden: str = "hidden_states", encoder: str = "encoder_hidden_states"
) -> tuple[Pair, ...]:
    """The pairs of a cross-attention: queries from one input, keys and values from the other."""
    return (
        reads(q, hidden, name="hidden_states"),
        reads(kv, encoder, name="encoder_hidden_states"),
        *output(out),
    )


def blocks(path: str, **sites: tuple[Pair, ...]) -> dict[str, tuple[Pair, ...]]:
    """The sites of a list of blocks: `blocks("layers", attn=SELF)` is {"layers.*.attn": SELF}."""
    return {f"{path}.*.{name}": pairs for name, pairs in sites.items()}


QKV = "to_q to_k to_v"
ADDED_QKV = "add_q_proj add_k_proj add_v_proj"

SEPARATE = (reads("q_proj k_proj v_proj", "hidden_states"), *output("o_proj"))  # transformers' names

SELF = (reads(QKV, "hidden_states"), *output("to_out.0"))
CROSS = cross("to_q", "to_k to_v", "to_out.0")
JOINT = (
    reads(QKV, "hidden_states"),
    reads(ADDED_QKV, "encoder_hidden_states"),
    *output("to_out.0"),
    *output("to_add_out", "encoder_attention_output"),
)
# The attention concatenates both inputs before its projections, or takes keys and values from a second argument that
# is the first one over again: one pair for both.
BOTH = (reads(QKV, "hidden_states", "encoder_hidden_states"), *output("to_out.0"))
# Separate projections for the text in some blocks, both inputs concatenated in the others.
JOINT_OR_BOTH = (reads(QKV, "hidden_states", "encoder_hidden_states", without="add_q_proj"), *JOINT)

# For attentions whose block has the output projection.
SELF_IN = SELF[:1]
BOTH_IN = BOTH[:1]

FEED_FORWARD = output("net.0.proj", "feed_forward")
ENCODER_FEED_FORWARD = output("net.0.proj", "encoder_feed_forward")

TEXT_AND_IMAGE = blocks("transformer_blocks", attn=JOINT, ff=FEED_FORWARD, ff_context=ENCODER_FEED_FORWARD)
# Not proj_mlp together with q, k, v: it reads the same tensor, but outside the attention.
SINGLE = {"single_transformer_blocks.*": (*output("proj_out"), *output("proj_mlp", "feed_forward"))}
SELF_CROSS = blocks("transformer_blocks", attn1=SELF, attn2=CROSS, ff=FEED_FORWARD)


def swiglu(projections: str, argument: str = "x", name: str = "feed_forward") -> tuple[Pair, ...]:
    """The optional pair of a gated MLP, whose two first Linears read the same argument."""
    return (reads(projections, argument, name=name),)
