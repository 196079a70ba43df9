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


def own(sites):
    return sl.register_architecture(sl.Architecture("My blocks", ("OneBlock",), sites))


@pytest.fixture
def own_table(monkeypatch):
    """What is registered in a test is gone after it."""
    table = dict(ARCHITECTURES)
    for module in ("records.registry", "core.sites", "core.fit"):
        monkeypatch.setattr(f"slora_diffusers.{module}.ARCHITECTURES", table)
    return table


GOOD = sl.Pair(("hidden_states",), ("to_q", "to_k", "to_v"))
MISTAKES = {
    "a path at its root": ({"block.*.attn": (GOOD,)}, r"'My blocks' names the site 'block.*.attn'.*no 'block' there"
                                                      r".*Its modules are blocks.*Did you mean 'blocks'"),
    "a path further in": ({"blocks.*.attention": (GOOD,)}, r"no 'attention' there.*At 'blocks.*' there are attn.*"
                                                           r"Did you mean 'attn'"),
    "one of two paths": ({"blocks.*.attn": (GOOD,), "blocks.*.mlp": (GOOD,)}, r"no 'mlp' there"),
    "a projection": ({"blocks.*.attn": (sl.Pair(("hidden_states",), ("to_q", "to_k", "to_vv")),)},
                     r"names the projection 'to_vv' of 'blocks.*.attn'.*Its Linears are to_q, to_k, to_v.*"
                     r"Did you mean 'to_v'"),
    "the only projection": ({"blocks.*.attn": (GOOD, sl.Pair((), ("to_out.1.proj",), "attention_output"))},
                            r"names the projection 'to_out.1.proj'"),
    "a projection that is a layer norm": ({"blocks.*.attn": (sl.Pair((), ("norm",), "x"),)}, "'norm'.*class LayerNorm"),
    "a projection that is an embedding": ({"blocks.*.attn": (sl.Pair((), ("table",), "x"),)}, "class Embedding"),
    "a projection without a weight": ({"blocks.*.attn": (sl.Pair((), ("to_out.1",), "x"),)}, "class Dropout"),
    "a bias": ({"blocks.*.attn": (sl.Pair((), ("to_q.bias",), "x"),)}, "'to_q.bias'.*class Parameter"),
    "one input in two pairs": ({"blocks.*.attn": (sl.Pair(("hidden_states",), ("to_q",)),
                                                  sl.Pair(("hidden_states",), ("to_k", "to_v"), "kv"))},
                               "both read the input 'hidden_states'"),
    "one weight in two pairs": ({"blocks.*.attn": (GOOD, sl.Pair((), ("to_v",), "v"))},
                                "both feed 'blocks.0.attn.to_v'"),
    "one site under two paths": ({"blocks.*.attn": (GOOD,), "blocks.0.attn": (sl.Pair((), ("to_q",), "again"),)},
                                 "both feed 'blocks.0.attn.to_q'"),
    "an input": ({"blocks.*": (sl.Pair(("hidden",), ("attn.to_q", "attn.to_k", "attn.to_v")),)},
                 r"names the input 'hidden' of 'blocks.*'.*takes hidden_states"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_record_that_does_not_fit_says_what_it_looked_for_and_what_is_there(mistake, own_table):
    sites, message = MISTAKES[mistake]
    own(sites)
    model = OneBlock(bias=True)
    model.blocks[0].attn.norm, model.blocks[0].attn.table = nn.LayerNorm(32), nn.Embedding(32, 32)
    before = traces(model)
    with pytest.raises(sl.ArchitectureError, match=message) as error:
        sl.add_serial_lora(model, sl.SerialLoraConfig())
    assert len(str(error.value)) < 500
    assert traces(model) == before


WRONG_KINDS = {
    "models as one string": lambda: sl.Architecture("Own", "OneBlock", {"a": (GOOD,)}),
    "a class for its name": lambda: sl.Architecture("Own", (OneBlock,), {"a": (GOOD,)}),
    "inputs as one string": lambda: sl.Pair("x", ("to_q",)),
    "projections as one string": lambda: sl.Pair(("x",), "q"),
    "no projection": lambda: sl.Pair(("x",), ()),
    "neither input nor name": lambda: sl.Pair((), ("to_q",)),
    "a name that no file can hold": lambda: sl.Pair(("x",), ("to_q",), "a.b"),
    "a pair alone": lambda: sl.Architecture("Own", ("OneBlock",), {"a": GOOD}),
    "names for pairs": lambda: sl.Architecture("Own", ("OneBlock",), {"a": ("to_q", "to_k")}),
    "no mapping of sites": lambda: sl.Architecture("Own", ("OneBlock",), ("a", (GOOD,))),
    "an empty name in a path": lambda: sl.Architecture("Own", ("OneBlock",), {".blocks": (GOOD,)}),
    "part of a name": lambda: sl.Architecture("Own", ("OneBlock",), {"bl*.attn": (GOOD,)}),
    "a path in two": lambda: sl.Architecture("Own", ("OneBlock",), {"blocks?.*": (GOOD,)}),
    "no record": lambda: {"models": ("OneBlock",)},
}


@pytest.mark.parametrize("mistake", list(WRONG_KINDS))
def test_a_record_of_the_wrong_kinds_is_refused_and_not_kept(mistake, own_table):
    before = dict(own_table)
    with pytest.raises(sl.ArchitectureError, match=r"such as|must be|needs|takes an|where|part of names") as error:
        sl.register_architecture(WRONG_KINDS[mistake]())
    assert len(str(error.value)) < 400
    assert own_table == before


def test_what_some_models_lack_is_marked(own_table):
    pair = sl.Pair(("hidden_states",), ("to_q", "to_k", "to_v", "to_gate?"))
    own({"blocks.*.attn": (pair,), "single_blocks.*.attn?": (GOOD,)})
    model, x = OneBlock().eval(), torch.randn(2, 5, 32)
    add_random_adapter(model)
    live = model(x)
    sl.fuse_serial_lora(model)
    assert torch.allclose(model(x), live, atol=1e-5)


def test_a_model_without_a_record_gets_the_nearest_and_the_page():
    class FluxTransformer2D(nn.Module):
        pass

    with pytest.raises(sl.ArchitectureError) as error:
        sl.add_serial_lora(FluxTransformer2D(), sl.SerialLoraConfig())
    text = str(error.value)
    assert "FluxTransformer2DModel" in text and "docs/architectures.md" in text and len(text) < 400


class Root(nn.Module):
    """A model that is a site itself."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states):
        return self.to_q(hidden_states) * self.to_k(hidden_states)


@pytest.mark.parametrize("weight", [{"": 0.5}, {".*": 0.5}, 0.5])
def test_a_site_at_the_root_obeys_site_weights_live_fused_and_exported(weight, own_table, tmp_path):
    sl.register_architecture(sl.Architecture("Root", ("Root",), {"": (sl.Pair(("hidden_states",), ("to_q", "to_k")),)}))
    torch.manual_seed(0)
    model, x = Root().eval(), torch.randn(2, 5, 8)
    add_random_adapter(model, alpha=6)
    A, B = (m.double() for m in sl.serial_lora_parameters(model))
    shifted = x.double() + 0.5 * 6 / 4 * x.double() @ A.T @ B.T
    wanted = model.double().to_q(shifted) * model.to_k(shifted)
    model.float()
    sl.set_serial_lora(model, "default", weight)
    assert torch.allclose(model(x).double(), wanted, atol=1e-4)
    sl.fuse_serial_lora(model)
    assert torch.allclose(model(x).double(), wanted, atol=1e-4)
    sl.unfuse_serial_lora(model)
    sl.save_serial_lora(model, tmp_path)
    again = Root().eval()
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "serial_lora" not in k})
    sl.load_serial_lora(again, tmp_path)
    sl.set_serial_lora(again, "default", weight)
    assert torch.allclose(again(x).double(), wanted, atol=1e-4)
    sl.set_serial_lora(model, "default", {"": 0.0})
    assert torch.allclose(model(x), model.to_q(x) * model.to_k(x))
