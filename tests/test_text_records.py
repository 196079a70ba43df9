"""Language models: live == fused == exported, with a cache of keys and values and without, Conv1D included."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from slora_diffusers import (
    AdapterStateError,
    ArchitectureError,
    SerialLoraConfig,
    add_serial_lora,
    compress_lora,
    disable_serial_lora,
    export_lora,
    fuse_serial_lora,
    load_serial_lora,
    save_serial_lora,
    serial_lora_batch,
    unfuse_serial_lora,
    unload_serial_lora,
)
from slora_diffusers.records.registry import ARCHITECTURES
from slora_diffusers.records.text import RECORDS
from tests.lora_by_hand import add_random_adapter, all_pairs, check_live_fused_and_by_hand, error
from tests.tiny.text import TEXT


@pytest.mark.parametrize("name", TEXT)
def test_live_equals_fused_equals_the_lora_by_hand(name: str):
    check_live_fused_and_by_hand(TEXT[name], all_pairs)


@pytest.mark.parametrize("name", [name for name in TEXT if "/" not in name])
def test_stock_peft_reproduces_the_adapter_from_its_export(name: str, tmp_path):
    tiny = TEXT[name]
    model = tiny.build()
    base = tiny.run(model)
    add_random_adapter(model, None)
    export_lora(model, tmp_path, format="peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # PEFT says that it found a Conv1D
        stock = PeftModel.from_pretrained(tiny.build(), tmp_path)
    assert error(tiny.run(stock), tiny.run(model), base) < 1e-3
    assert error(tiny.run(stock.merge_and_unload()), tiny.run(model), base) < 1e-3


def test_every_class_of_the_records_is_in_a_tiny_model():
    found = set()
    for tiny in TEXT.values():
        found |= {type(module).__name__ for module in tiny.build().modules()}
    there = {name for record in RECORDS for name in record.models if _has(name)}
    assert there - found == set()
    assert all(ARCHITECTURES[name] in RECORDS for record in RECORDS for name in record.models)


def _has(block: str) -> bool:
    """Whether the installed transformers has models of such blocks: older ones lack some families."""
    stem = block.removesuffix("Layer").removesuffix("Block").removesuffix("Decoder").removesuffix("Encoder")
    stem = stem.removesuffix("Text").removesuffix("Vision").removesuffix("Attention")
    names = [f"{stem}{end}" for end in ("Model", "ForCausalLM", "VisionModel", "TextModel")]
    return stem == "Transformer" or any(hasattr(transformers, name) for name in names)


GENERATING = (
    *("LlamaForCausalLM", "Gemma2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel"),
    *("GPTNeoXForCausalLM", "Gemma4ForCausalLM", "WhisperForConditionalGeneration"),
)


def generated(model: Any, name: str, **options: object) -> tuple[Tensor, Tensor]:
    """Tokens and their scores, greedy unless options say otherwise."""
    given = TEXT[name].arguments()
    given.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    output = model.generate(**given, return_dict_in_generate=True, output_logits=True, **settings)
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("name", [name for name in GENERATING if name in TEXT])
def test_generation_with_a_cache_gives_what_the_fused_model_gives_without_one(name: str):
    model = TEXT[name].build()
    _, base = generated(model, name)
    add_random_adapter(model, all_pairs(model))
    tokens, logits = generated(model, name)
    fuse_serial_lora(model)
    expected, expected_logits = generated(model, name, use_cache=False)
    assert torch.equal(tokens, expected)
    assert not torch.allclose(logits, base, atol=0.1)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=["beams", "static"])
def test_beams_and_static_caches_go_through_the_pairs(options: dict[str, object]):
    model = TEXT["LlamaForCausalLM"].build()
    add_random_adapter(model, None)
    tokens, _ = generated(model, "LlamaForCausalLM", **options)
    fuse_serial_lora(model)
    assert torch.equal(tokens, generated(model, "LlamaForCausalLM", **options)[0])


def test_each_text_of_a_batch_is_generated_with_its_own_adapter():
    model = TEXT["Qwen2ForCausalLM"].build()
    add_random_adapter(model, None)
    both, _ = generated(model, "Qwen2ForCausalLM")
    with disable_serial_lora(model):
        neither, _ = generated(model, "Qwen2ForCausalLM")
    with serial_lora_batch(model, ["default", None]):
        mixed, _ = generated(model, "Qwen2ForCausalLM")
    assert torch.equal(mixed[0], both[0])
    assert torch.equal(mixed[1], neither[1])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Qwen2ForCausalLM", {"num_beams": 2}),
        ("Qwen2ForCausalLM", {"num_beams": 3, "num_return_sequences": 2}),
        ("Qwen2ForCausalLM", {"num_return_sequences": 2}),
        ("WhisperForConditionalGeneration", {"num_beams": 2}),
    ],
)
def test_beams_and_sequences_of_a_text_have_its_adapter(name: str, options: dict[str, Any]):
    model = TEXT[name].build()
    add_random_adapter(model, None)
    settings = {**options, "do_sample": "num_beams" not in options}

    def tokens(entries: list[str | None]) -> Tensor:
        torch.manual_seed(0)
        with serial_lora_batch(model, entries):
            return generated(model, name, **settings)[0]

    both, neither, mixed = tokens(["default", "default"]), tokens([None, None]), tokens(["default", None])
    each = options.get("num_return_sequences", 1)
    assert len(mixed) == 2 * each
    assert torch.equal(mixed[:each], both[:each])
    assert torch.equal(mixed[each:], neither[each:])
    assert not torch.equal(both, neither)


@pytest.mark.parametrize("entries", [["default"] * 3, ["default"] * 4])
def test_names_that_fit_neither_texts_nor_their_beams_are_refused(entries: list[str]):
    model = TEXT["Qwen2ForCausalLM"].build()
    add_random_adapter(model, None)
    with serial_lora_batch(model, entries), pytest.raises(AdapterStateError, match="one name per sample"):
        generated(model, "Qwen2ForCausalLM", num_beams=3)


def test_sequences_that_whisper_makes_before_it_generates_are_refused():
    model = TEXT["WhisperForConditionalGeneration"].build()
    add_random_adapter(model, None)
    with serial_lora_batch(model, ["default", None]), pytest.raises(AdapterStateError, match="batch of 4"):
        generated(model, "WhisperForConditionalGeneration", num_return_sequences=2, do_sample=True)


def test_transposed_weights_save_load_and_fuse_in_place(tmp_path):
    tiny = TEXT["GPT2LMHeadModel"]
    model, other = tiny.build(), tiny.build()
    before = {name: (p.shape, p.stride(), p.data_ptr()) for name, p in model.named_parameters()}
    add_random_adapter(model, None)
    live = tiny.run(model)
    save_serial_lora(model, tmp_path)
    load_serial_lora(other, tmp_path)
    assert torch.equal(tiny.run(other), live)
    fuse_serial_lora(model)
    fused = {name: (p.shape, p.stride()) for name, p in model.named_parameters()}
    assert all(fused[name] == (shape, stride) for name, (shape, stride, _) in before.items())
    model.save_pretrained(tmp_path / "fused")
    stock = type(model).from_pretrained(tmp_path / "fused").eval()
    torch.testing.assert_close(tiny.run(stock), live, rtol=1e-3, atol=1e-3)
    unfuse_serial_lora(model)
    unload_serial_lora(model)
    assert {name: (p.shape, p.stride(), p.data_ptr()) for name, p in model.named_parameters()} == before


def test_a_lora_of_gpt2_is_compressed_where_a_pair_can_carry_it(tmp_path):
    """dW = W s B A is what an export of a serial adapter is; the closed form gives it back."""
    tiny = TEXT["GPT2LMHeadModel"]
    model, other = tiny.build(), tiny.build()
    add_random_adapter(model, None)
    export_lora(model, tmp_path, format="peft")
    report = compress_lora(other, tmp_path, rank=3)
    assert report.total_error < 1e-4
    assert error(tiny.run(other), tiny.run(model), tiny.run(tiny.build())) < 1e-3


def test_deberta_is_refused_with_the_reason():
    config = transformers.DebertaV2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    with pytest.raises(ArchitectureError, match="positions go through the same projections"):
        add_serial_lora(transformers.DebertaV2Model(config), SerialLoraConfig(rank=2))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "WhisperForConditionalGeneration"])
def test_gradients_reach_the_pairs_and_nothing_else(name: str):
    model = TEXT[name].build()
    add_random_adapter(model, all_pairs(model))
    model.train()
    model(**TEXT[name].arguments())[0].float().pow(2).sum().backward()
    for key, parameter in model.named_parameters():
        trained = ".serial_lora." in key
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, key


def test_a_neighbouring_peft_lora_on_conv1d_is_refused_by_fuse():
    model = TEXT["GPT2LMHeadModel"].build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stacked = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    add_random_adapter(model, None)
    stacked(**TEXT["GPT2LMHeadModel"].arguments())
    with pytest.raises(ValueError, match="LoRA of PEFT"):
        fuse_serial_lora(model)
