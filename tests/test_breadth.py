"""Every transformer of diffusers has a record, and every record is exact: live == fused == exported.

The reference is worked out here, by hand: the places from the records' patterns as regular expressions, and the fused
weights `W (I + s B A)` in float64.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slora_diffusers import SerialLoraConfig, fuse_serial_lora, load_serial_lora, unfuse_serial_lora
from slora_diffusers.convert import export_lora
from slora_diffusers.records.registry import ARCHITECTURES, REFUSED, Architecture, Pair
from tests.tiny.models import TINY, transformer_classes

RANK, SCALE = 3, 0.7
CONFIG = SerialLoraConfig(rank=RANK, alpha=RANK * SCALE)
NAMES = [name for name, tiny in TINY.items() if tiny.class_name in transformer_classes()]
CLASSES = sorted({TINY[name].class_name for name in NAMES})

QKV = re.compile(r"(.*_)?(q|k|v|qkv|kv|query|key|value)(_.*)?")
LEFT_OUT = {
    r"HunyuanDiT2DModel\.time_extra_emb\.pooler\..*": "pools the text once, and adds positions before projecting",
    r"MochiTransformer3DModel\.time_embed\.pooler\..*": "pools the text once, and adds its mean before projecting",
    r"SanaWMLTX2RefinerTransformer3DModel\..*audio.*": "built for LTX-2's checkpoints, but never called",
    r"RFD4ProteinaTransformer\.insertion_[qk]_proj": "a head on the model's output",
}
"""Projections that no pair feeds, and why."""


@dataclass
class Place:
    """One pair of a record, found in a model: its key and the Linears it feeds."""

    key: str
    pair: Pair
    linears: dict[str, nn.Linear]


def places_of(model: nn.Module, record: Architecture) -> list[Place]:
    """Every pair of a record in a model, read off the record without the library's help."""
    found: dict[str, Place] = {}
    for path, site in model.named_modules():
        for pattern, pairs in record.sites.items():
            if not re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), path):
                continue
            modules = dict(site.named_modules())
            for pair in pairs:
                linears = {n: modules[n] for n in pair.projections if isinstance(modules.get(n), nn.Linear)}
                key = f"{path}.serial_lora.{pair.name}"
                if linears and not (pair.without and pair.without in modules):
                    found.setdefault(key, Place(key, pair, linears))
    return list(found.values())


def draw_adapter(places: list[Place]) -> dict[str, tuple[Tensor, Tensor]]:
    """{key: (A (r, d), B (d, r))}, of a size that changes the output visibly."""
    r = torch.Generator().manual_seed(1)
    adapter = {}
    for place in places:
        d = next(iter(place.linears.values())).in_features
        adapter[place.key] = (
            torch.randn(RANK, d, generator=r) / d**0.5,
            torch.randn(d, RANK, generator=r) / RANK**0.5,
        )
    return adapter


def fuse_by_hand(places: list[Place], adapter: dict[str, tuple[Tensor, Tensor]]) -> None:
    """W <- W (I + s B A) in float64 for every projection of every place."""
    for place in places:
        A, B = (matrix.double() for matrix in adapter[place.key])
        for linear in place.linears.values():
            W = linear.weight.data.double()
            linear.weight.data = (W + SCALE * (W @ B) @ A).float()


def add_lora_by_hand(model: nn.Module, lora: dict[str, Tensor]) -> None:
    """W <- W + lora_B lora_A for every module of an ordinary LoRA, whose scale is 1."""
    for key in (key for key in lora if key.endswith(".lora_A.weight")):
        path = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        weight = model.get_submodule(path).get_parameter("weight")
        weight.data += lora[key.replace("lora_A", "lora_B")] @ lora[key]


def load(model: nn.Module, adapter: dict[str, tuple[Tensor, Tensor]]) -> None:
    state = {
        f"transformer.{key}.lora_{part}.weight": matrix
        for key, both in adapter.items()
        for part, matrix in zip("AB", both, strict=True)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a state dict carries no header
        load_serial_lora(model, state, config=CONFIG)


def error(got: Tensor, expected: Tensor, base: Tensor) -> float:
    """Size of the difference, relative to what the adapter changes."""
    return ((got - expected).norm() / (expected - base).norm()).item()


def test_every_transformer_of_diffusers_has_a_record_or_a_refusal():
    undecided = {n for n in transformer_classes() if (n in ARCHITECTURES) == (n in REFUSED)}
    assert not undecided, (
        f"{sorted(undecided)} must be in exactly one of ARCHITECTURES and REFUSED: read what its attentions project, "
        "write a record in slora_diffusers/records (or the reason against it), and a tiny model in tests/tiny_*.py."
    )
    assert all(len(reason) > 20 for reason in REFUSED.values())


def test_every_supported_transformer_has_a_tiny_model():
    assert {n for n in transformer_classes() if n in ARCHITECTURES} == set(CLASSES)


@pytest.mark.filterwarnings("ignore:diffusers has no LoRA loader")
@pytest.mark.parametrize("optional", [False, True], ids=["default", "all-pairs"])
@pytest.mark.parametrize("name", NAMES)
def test_live_equals_fused_equals_exported_equals_the_formula(name: str, optional: bool, tmp_path: Path):
    tiny = TINY[name]
    model, reference, exported = tiny.build(), tiny.build(), tiny.build()
    base_state, base = {key: value.clone() for key, value in model.state_dict().items()}, tiny.run(model)
    places = [p for p in places_of(reference, ARCHITECTURES[tiny.class_name]) if optional or not p.pair.optional]
    adapter = draw_adapter(places)
    fuse_by_hand(places, adapter)
    expected = tiny.run(reference)
    assert (expected - base).norm() > 0.01 * base.norm()

    load(model, adapter)
    live = tiny.run(model)
    export_lora(model, tmp_path)
    add_lora_by_hand(exported, load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    fuse_serial_lora(model)
    fused = tiny.run(model)
    unfuse_serial_lora(model)

    assert error(live, expected, base) < 1e-3
    assert error(fused, expected, base) < 1e-3
    assert error(tiny.run(exported), expected, base) < 1e-3
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base_state.items())


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_pair_of_the_record_is_somewhere_in_the_model(class_name: str):
    record = ARCHITECTURES[class_name]
    alone = {pattern: replace(record, sites={pattern: pairs}) for pattern, pairs in record.sites.items()}
    models = [TINY[name].build() for name in NAMES if TINY[name].class_name == class_name]
    found = {
        (pattern, place.pair) for model in models for pattern in alone for place in places_of(model, alone[pattern])
    }
    wanted = {(pattern, pair) for pattern, pairs in record.sites.items() for pair in pairs}
    assert {f"{pattern}: {pair.name} -> {' '.join(pair.projections)}" for pattern, pair in wanted - found} == set()


@pytest.mark.parametrize("name", NAMES)
def test_every_query_key_and_value_projection_is_fed_once(name: str):
    tiny = TINY[name]
    model = tiny.build()
    places = places_of(model, ARCHITECTURES[tiny.class_name])
    every = [id(linear) for place in places for linear in place.linears.values()]
    assert len(every) == len(set(every))  # two pairs on one Linear would multiply, and not add
    fed = {id(linear) for place in places if not place.pair.optional for linear in place.linears.values()}
    forgotten = [
        f"{tiny.class_name}.{path}"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and QKV.fullmatch(path.rpartition(".")[2]) and id(module) not in fed
    ]
    assert [path for path in forgotten if not any(re.fullmatch(pattern, path) for pattern in LEFT_OUT)] == []


@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", "LTX2VideoTransformer3DModel/gated"])
def test_a_record_that_forgets_a_projection_is_caught(name: str):
    tiny = TINY[name]
    model, reference = tiny.build(), tiny.build()
    base = tiny.run(model)
    places = [place for place in places_of(reference, ARCHITECTURES[tiny.class_name]) if not place.pair.optional]
    adapter = draw_adapter(places)
    for place in places:
        place.linears.pop("to_gate_logits" if "gated" in name else "to_v", None)
    fuse_by_hand(places, adapter)
    load(model, adapter)
    assert error(tiny.run(model), tiny.run(reference), base) > 0.01
