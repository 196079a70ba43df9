"""Where pairs sit, against a table written by hand; what is refused, and what an error lists."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

import slora_diffusers as sl
from slora_diffusers.core.sites import find_slots, select_slots, unwrap
from slora_diffusers.records.registry import ARCHITECTURES
from tests.adapters import add_random_adapter, output_of, traces
from tests.reference import FAMILIES, OPTIONAL, places, width
from tests.tiny.models import TINY


@pytest.mark.parametrize("name", FAMILIES)
def test_the_places_are_those_of_the_table(name):
    model = TINY[name].build()
    found = {slot.key: slot for slot in find_slots(model)}
    expected = places(model, optional=True)
    assert set(found) == set(expected)
    for key, (site, row) in expected.items():
        slot = found[key]
        assert slot.module is site and slot.features == width(site, row)
        assert tuple(p.name for p in slot.projections) == row.projections
        assert all(p.weight is site.get_submodule(p.name).weight for p in slot.projections)
        assert slot.pair.optional is row.optional


@pytest.mark.parametrize("name", FAMILIES)
def test_every_query_key_and_value_projection_has_exactly_one_pair(name):
    model = TINY[name].build()
    fed = [id(p.owner) for slot in find_slots(model) for p in slot.projections]
    assert len(fed) == len(set(fed))
    wanted = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    linears = {id(m) for path, m in model.named_modules() if path.rpartition(".")[2] in wanted and m is not None}
    assert linears <= set(fed)


@pytest.mark.parametrize("name", FAMILIES)
def test_optional_pairs_are_off_unless_they_are_named(name):
    model = TINY[name].build()
    assert {s.key for s in select_slots(model, sl.SerialLoraConfig())} == set(places(model))
    names = [n for n in OPTIONAL if any(row.name == n for _, row in places(model, optional=True).values())]
    chosen = select_slots(model, sl.SerialLoraConfig(inputs=["hidden_states", *names]))
    wanted = {k for k, (_, row) in places(model, True).items() if row.name == "hidden_states" or row.optional}
    assert {s.key for s in chosen} == wanted


def test_a_config_chooses_sites_by_pattern_layer_and_input():
    model = TINY["SD3Transformer2DModel"].build()

    def keys(**settings):
        return [slot.key for slot in select_slots(model, sl.SerialLoraConfig(**settings))]

    assert keys(targets=r".*\.attn2") == ["transformer_blocks.0.attn2.serial_lora.hidden_states"]
    assert keys(layers=1, inputs="encoder_hidden_states") == [
        "transformer_blocks.1.attn.serial_lora.encoder_hidden_states"
    ]
    assert keys(exclude=[r".*\.[01]\..*"], inputs="hidden_states") == [
        "transformer_blocks.2.attn.serial_lora.hidden_states"
    ]


def test_a_rank_pattern_may_name_one_pair_of_a_site():
    model = TINY["SD3Transformer2DModel"].build()
    pattern = {r".*\.0\.attn\.serial_lora\.encoder_hidden_states": 2, r".*\.attn2": 3}
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=5, rank_pattern=pattern))
    ranks = {k: A.shape[0] for k, A in sl.serial_lora_state_dict(model).items() if "lora_A" in k}
    assert sorted(ranks.values()) == [2, 3, 5, 5, 5, 5, 5]
    assert ranks["transformer.transformer_blocks.0.attn.serial_lora.encoder_hidden_states.lora_A.weight"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inputs": "hidden"}, r"names \['hidden'\], but DiTTransformer2DModel has \['hidden_states'"),
        ({"targets": "attn1"}, "The pattern 'attn1' matches no site.*4 sites: transformer_blocks.0.attn1"),
        ({"layers": 7}, r"Nothing matched.*layers=\(7,\).*transformer_blocks.0.attn1"),
        ({"exclude": ".*"}, "Nothing matched"),
        ({"inputs": ()}, r"Nothing matched inputs=\(\)"),
        ({"targets": [r".*\.0\.attn1", "nowhere"]}, "The pattern 'nowhere' matches no site"),
        ({"rank_pattern": {"nowhere": 4}}, "'nowhere' matches no site"),
        ({"alpha_pattern": {"nowhere": 4}}, "'nowhere' matches no site"),
    ],
)
def test_a_choice_that_matches_nothing_lists_what_there_is_and_changes_nothing(settings, message):
    model = TINY["DiTTransformer2DModel"].build()
    before = traces(model)
    with pytest.raises(sl.SerialLoraError, match=message):
        sl.add_serial_lora(model, sl.SerialLoraConfig(**settings))
    assert traces(model) == before


def test_a_model_without_a_record_is_refused_and_told_how_to_add_one():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(sl.ArchitectureError, match=r"No architecture.*Sequential.*register_architecture"):
        sl.add_serial_lora(model, sl.SerialLoraConfig())
    assert "_serial_lora" not in vars(model) and not model._forward_pre_hooks
    with pytest.raises(sl.AdapterStateError, match="has no Serial LoRA adapter"):
        sl.serial_lora_parameters(model)


class Block(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attn = Attention(query_dim=32, heads=2, dim_head=16, **settings)

    def forward(self, hidden_states):
        return self.attn(hidden_states)


class OneBlock(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.blocks = nn.ModuleList([Block(**settings)])

    def forward(self, hidden_states):
        return self.blocks[0](hidden_states)


@pytest.fixture
def own_record():
    pair = sl.Pair(("hidden_states",), ("to_q", "to_k", "to_v"))
    yield sl.register_architecture(sl.Architecture("Own", ("OneBlock",), {"blocks.*.attn": (pair,)}))
    del ARCHITECTURES["OneBlock"]


def test_a_registered_record_serves_a_model_of_ones_own_and_what_contains_it(own_record):
    model, x = OneBlock().eval(), torch.randn(2, 5, 32)
    outer = nn.Sequential(model)
    base = outer(x)
    sl.add_serial_lora(outer, sl.SerialLoraConfig(rank=2))
    assert torch.equal(outer(x), base)
    assert [p for p, _ in outer.named_parameters() if "lora" in p] == [
        "0.blocks.0.attn.serial_lora.hidden_states.lora_A_default",
        "0.blocks.0.attn.serial_lora.hidden_states.lora_B_default",
    ]
    assert next(iter(sl.serial_lora_state_dict(outer))).startswith("model.0.blocks.0.attn.serial_lora.hidden_states.")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"norm_num_groups": 4}, "group_norm"),
        ({"spatial_norm_dim": 8}, "spatial_norm"),
        ({"cross_attention_dim": 16, "cross_attention_norm": "layer_norm"}, "norm_cross"),
        ({"residual_connection": True}, "residual connection"),
    ],
)
def test_an_attention_that_changes_its_input_first_is_refused(own_record, settings, named):
    model = OneBlock(**settings)
    with pytest.raises(sl.ArchitectureError, match=f"blocks.0.attn.*{named}"):
        sl.add_serial_lora(model, sl.SerialLoraConfig())
    assert "serial_lora" not in str(list(model.state_dict()))


def test_projections_of_different_widths_cannot_share_a_pair():
    pair = sl.Pair(("hidden_states",), ("to_q", "to_k"))
    sl.register_architecture(sl.Architecture("Own", ("OneBlock",), {"blocks.*.attn": (pair,)}))
    try:
        with pytest.raises(sl.ArchitectureError, match=r"different widths: \{.to_q.: 32, .to_k.: 12\}"):
            sl.add_serial_lora(OneBlock(cross_attention_dim=12), sl.SerialLoraConfig())
    finally:
        del ARCHITECTURES["OneBlock"]


@pytest.mark.parametrize(("models", "sites"), [((), {"a": "pair"}), (("M",), {}), (("M",), {"a": ()})])
def test_an_empty_record_is_refused(models, sites):
    with pytest.raises(sl.ArchitectureError, match="at least one model class name"):
        sl.register_architecture(sl.Architecture("Own", models, sites))
    assert "M" not in ARCHITECTURES


@pytest.mark.parametrize("wrapper", ["compile", "DataParallel"])
def test_wrapped_models_have_the_same_places_and_keys(wrapper):
    tiny = TINY["DiTTransformer2DModel"]
    model = tiny.build()
    wrapped = torch.compile(model, backend="eager") if wrapper == "compile" else nn.DataParallel(model)
    add_random_adapter(wrapped)
    assert unwrap(wrapped) is model
    assert set(sl.serial_lora_state_dict(wrapped)) == set(sl.serial_lora_state_dict(model))
    wanted = {f"transformer.{key}.lora_{part}.weight" for key in places(model) for part in "AB"}
    assert set(sl.serial_lora_state_dict(wrapped)) == wanted
    assert not torch.equal(output_of(model, tiny), output_of(tiny.build(), tiny))


def test_blocks_compiled_one_by_one_have_the_same_keys():
    model = TINY["DiTTransformer2DModel"].build()
    keys = [slot.key for slot in find_slots(model)]
    for i, block in enumerate(model.transformer_blocks):
        model.transformer_blocks[i] = torch.compile(block, backend="eager")
    assert [slot.key for slot in find_slots(model)] == keys
