"""Records: registering one, what they refuse, and the documentation that is built from them."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from torch import nn

from docs.build_tables import REGIONS, ROOT, rebuilt
from slora_diffusers import (
    Architecture,
    ArchitectureError,
    Pair,
    SerialLoraConfig,
    add_serial_lora,
    fuse_serial_lora,
    register_architecture,
    serial_lora_parameters,
)
from slora_diffusers.records.registry import ARCHITECTURES

PAIR = Pair(("hidden_states",), ("to_q",))
CONFIG = SerialLoraConfig(rank=2)
BASIC = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 16,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Architecture]:
    """The table of records, as it was again after the test."""
    table = dict(ARCHITECTURES)
    monkeypatch.setattr("slora_diffusers.records.registry.ARCHITECTURES", table)
    monkeypatch.setattr("slora_diffusers.core.sites.ARCHITECTURES", table)
    monkeypatch.setattr("slora_diffusers.core.fit.ARCHITECTURES", table)
    return table


@pytest.mark.parametrize(
    "record",
    [
        Architecture("none", (), {"blocks.*": (PAIR,)}),
        Architecture("no site", ("Model",), {}),
        Architecture("no pair", ("Model",), {"blocks.*": ()}),
    ],
    ids=lambda record: record.family,
)
def test_an_empty_record_is_refused_and_not_kept(record: Architecture, registry: dict[str, Architecture]):
    before = dict(registry)
    with pytest.raises(ArchitectureError, match="at least one model class name"):
        register_architecture(record)
    assert registry == before


def test_a_model_without_a_record_names_the_way_out():
    with pytest.raises(ArchitectureError, match=r"No architecture is registered for Linear.*register_architecture"):
        add_serial_lora(nn.Linear(4, 4), CONFIG)


@pytest.mark.parametrize("key", ["only_cross_attention", "double_self_attention"])
def test_a_config_that_reroutes_the_inputs_is_refused_before_anything_changes(key: str):
    model = Transformer2DModel(**BASIC, **{key: True})
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ArchitectureError, match=f"{key}=False only"):
        add_serial_lora(model, CONFIG)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_container_as_site_is_refused(registry: dict[str, Architecture]):
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.GELU())

    register_architecture(Architecture("mlp", ("Mlp",), {"net": (Pair((), ("0",), "hidden_states"),)}))
    with pytest.raises(ArchitectureError, match="Sequential"):
        add_serial_lora(Mlp(), CONFIG)


def test_projections_of_different_widths_cannot_share_a_pair(registry: dict[str, Architecture]):
    class Widths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Module()
            self.attn.to_q, self.attn.to_k = nn.Linear(4, 4), nn.Linear(6, 4)

    record = Architecture("widths", ("Widths",), {"attn": (Pair(("hidden_states",), ("to_q", "to_k")),)})
    register_architecture(record)
    with pytest.raises(ArchitectureError, match="different widths"):
        add_serial_lora(Widths(), CONFIG)


def test_a_record_serves_subclasses_and_models_that_contain_its_model():
    class Mine(Transformer2DModel):
        pass

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    assert add_serial_lora(Mine(**BASIC), CONFIG).sites == 2
    report = add_serial_lora(unet, CONFIG)
    assert report.sites == 2 * sum(isinstance(module, Transformer2DModel) for module in unet.modules()) > 2

    for parameter in serial_lora_parameters(unet):
        nn.init.normal_(parameter, std=0.2)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([5, 7]), torch.randn(2, 3, 12)
    with torch.no_grad():
        live = unet(*inputs).sample
        fuse_serial_lora(unet)
        torch.testing.assert_close(unet(*inputs).sample, live, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", [path for path in REGIONS if path.exists()], ids=lambda path: path.name)
def test_the_tables_are_up_to_date(path):
    assert rebuilt(path) == path.read_text(encoding="utf-8"), "run: python -m docs.build_tables"


def test_a_page_without_markers_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# nothing here", encoding="utf-8")
    monkeypatch.setattr("docs.build_tables.REGIONS", {page: {"architectures": str}})
    monkeypatch.setattr("docs.build_tables.ROOT", tmp_path)
    with pytest.raises(ValueError, match="architectures:begin"):
        rebuilt(page)


def test_the_snippets_of_the_documentation_run_and_the_record_in_them_is_exact(registry: dict[str, Architecture]):
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 4
    record = re.search(r"^pairs = .*^register_architecture\(.*\)$", snippets[1], re.DOTALL | re.MULTILINE)
    assert record is not None
    assert record[0].count("\n") < 10
    names: dict = {}
    for snippet in snippets:
        exec(snippet, names)
    assert registry["MyTransformer"].family == "My transformer"
    assert add_serial_lora(names["MyTransformer"](), SerialLoraConfig(rank=4, inputs=("attention_output",))).pairs == 2
