"""docs/format.md, followed to the letter by a reader that knows nothing of the package."""

from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import slora_diffusers as sl
from tests.adapters import add_random_adapter, output_of
from tests.tiny.models import TINY

PAGE = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
SD3 = TINY["SD3Transformer2DModel"]


def reader():
    """The page's own function."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    scope = {}
    exec(code, scope)
    return scope["pairs"]


@pytest.fixture(params=[{"alpha": 6}, {"alpha": 3, "rslora": True}, {"rank_pattern": {r".*\.0\.attn": 2}}], ids=str)
def saved(request, tmp_path):
    model = SD3.build()
    add_random_adapter(model, **{"alpha": None, **request.param})
    return model, sl.save_serial_lora(model, tmp_path)


def test_the_pages_reader_and_equation_give_the_fused_weights(saved):
    model, path = saved
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["serial_lora"])["components"]["transformer"]["config"]
    modules, read = dict(model.named_modules()), {}
    for place, A, B in reader()(path):
        component, _, rest = place.partition(".")
        site, _, pair = rest.partition(".serial_lora.")
        r = A.shape[0]
        ranks = [n for p, n in config["rank_pattern"].items() if re.fullmatch(p, site) or re.fullmatch(p, rest)]
        assert component == "transformer" and r == (ranks or [config["rank"]])[0]
        alpha = r if config["alpha"] is None else config["alpha"]
        s = alpha / math.sqrt(r) if config["rslora"] else alpha / r
        if pair == "hidden_states":
            W = modules[site].to_q.weight.double()
            read[site] = W + s * W @ B.double() @ A.double()
    sl.fuse_serial_lora(model)
    assert read
    for site, W in read.items():
        assert torch.allclose(modules[site].to_q.weight.double(), W, atol=1e-5)


def test_the_fingerprint_is_the_one_that_the_page_describes(saved):
    from slora_diffusers.core.sites import find_slots

    model, path = saved
    with safe_open(path, framework="pt") as file:
        text = json.loads(file.metadata()["serial_lora"])["components"]["transformer"]["base"]["fingerprint"]
    weights = [p.weight.detach() for slot in find_slots(model) for p in slot.projections]
    count = len(weights)
    chosen = [weights[i * count // 64] for i in range(64)] if count >= 64 else weights
    each = math.ceil(64 / len(chosen))
    numbers = np.concatenate([W[:: max(1, len(W) // each), W.shape[1] // 3][:each].numpy() for W in chosen])[:128]
    assert base64.b64encode(numbers.astype("<f4").tobytes()).decode() == text


def test_a_file_written_by_the_page_alone_loads(tmp_path):
    from safetensors.torch import save_file

    model = SD3.build()
    add_random_adapter(model, alpha=6)
    tensors = dict(sl.serial_lora_state_dict(model))
    header = {"format_version": 1, "components": {"transformer": {"config": {"rank": 4, "alpha": 6}, "base": {}}}}
    save_file(tensors, tmp_path / "serial_lora_weights.safetensors", metadata={"serial_lora": json.dumps(header)})
    other = SD3.build()
    sl.load_serial_lora(other, tmp_path)
    assert torch.equal(output_of(other, SD3), output_of(model, SD3))


def test_whole_modules_are_under_the_keys_that_the_page_gives(tmp_path):
    model = SD3.build()
    add_random_adapter(model, modules_to_save=["proj_out"])
    path = sl.save_serial_lora(model, tmp_path)
    assert "`<component>.<path>.modules_to_save.<name>`" in PAGE
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["serial_lora"])["components"]["transformer"]["config"]
        keys = [key for key in file.keys() if ".modules_to_save." in key]  # noqa: SIM118 (not a dict)
        state = {key.removeprefix("transformer.proj_out.modules_to_save."): file.get_tensor(key) for key in keys}
    assert (
        config["modules_to_save"] == ["proj_out"]
        and len(list(reader()(path))) == len(sl.serial_lora_state_dict(model)) // 2 - 1
    )
    stock = SD3.build()
    pairs = {k: t for k, t in sl.serial_lora_state_dict(model).items() if ".modules_to_save." not in k}
    stock.proj_out.load_state_dict(state)
    sl.load_serial_lora(stock, pairs, config=sl.SerialLoraConfig(rank=4, alpha=6))
    assert torch.allclose(output_of(stock, SD3), output_of(model, SD3), atol=1e-6)
