"""For those who come from PEFT: its names are answered, its config is translated, and the guide's code runs."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from slora_diffusers import SerialLoraConfig, SerialLoraError, add_serial_lora, compress_lora, load_serial_lora
from tests.tiny.text import TEXT

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "coming-from-peft.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"r": 8}, "r= of PEFT is rank="),
        ({"lora_alpha": 16}, "lora_alpha= of PEFT is alpha="),
        ({"lora_dropout": 0.1}, "is dropout="),
        ({"use_rslora": True}, "is rslora="),
        ({"target_modules": ["q_proj"]}, "inputs="),
        ({"layers_to_transform": [1]}, "is layers="),
        ({"rank": 4, "task_type": "CAUSAL_LM"}, "stays of its own class"),
    ],
)
def test_pefts_names_are_answered_with_ours(given: dict[str, Any], answer: str):
    with pytest.raises(SerialLoraError, match=re.escape(answer)):
        SerialLoraConfig(**given)


def test_other_names_are_unknown_as_ever():
    with pytest.raises(TypeError, match="ranks"):
        SerialLoraConfig(ranks=3)  # pyright: ignore[reportCallIssue]


def test_a_lora_config_is_translated():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora = LoraConfig(r=6, lora_alpha=12, lora_dropout=0.1, use_rslora=True, layers_to_transform=[1])
        lora.target_modules = ["q_proj", "v_proj"]
        config = SerialLoraConfig.from_peft(lora)
    assert config == SerialLoraConfig(rank=6, alpha=12, dropout=0.1, rslora=True, layers=[1])
    json = LoraConfig(r=6, lora_alpha=12, target_modules=["q_proj"]).to_dict()
    assert SerialLoraConfig.from_peft(json) == SerialLoraConfig(rank=6, alpha=12)
    model = TEXT["LlamaForCausalLM"].build()
    assert add_serial_lora(model, config).pairs == 1


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["q_proj", "o_proj"], "'attention_output'"),
        (["q_proj", "up_proj"], "'feed_forward'"),
        ("all-linear", "'attention_output' and 'feed_forward'"),
        (["to_q", "to_out.0"], "'attention_output'"),
    ],
)
def test_targets_beyond_q_k_v_say_which_inputs_reach_them(targets: Any, names: str):
    with pytest.warns(UserWarning, match=re.escape(names)):
        SerialLoraConfig.from_peft(LoraConfig(target_modules=targets))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = SerialLoraConfig.from_peft(LoraConfig(target_modules=targets), inputs=("hidden_states",))
    assert given.inputs == ("hidden_states",)


def test_what_has_no_counterpart_is_named():
    with pytest.warns(UserWarning, match="use_dora, bias has no counterpart"):
        given = SerialLoraConfig.from_peft(LoraConfig(use_dora=True, modules_to_save=["head"], bias="all"))
    assert given.modules_to_save == ("head",)
    with pytest.raises(SerialLoraError, match="takes a LoraConfig"):
        SerialLoraConfig.from_peft(IA3Config())


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, eos_token=alphabet[0], pad_token=alphabet[0])


def base() -> Any:
    config = {**TEXT["LlamaForCausalLM"].build().config.to_dict(), "vocab_size": 256, "max_position_embeddings": 128}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


@pytest.mark.usefixtures("fresh_accelerator")
def test_the_guides_code_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "HuggingFaceTB" / "SmolLM2-135M"
    base().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    arguments = transformers.TrainingArguments

    def quick(*given: Any, **named: Any) -> Any:
        return arguments(*given, **{**named, "use_cpu": True, "report_to": [], "logging_steps": 25, "seed": 1})

    monkeypatch.setattr(transformers, "TrainingArguments", quick)
    names: dict[str, Any] = {}
    assert len(BLOCKS) == 3
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/coming-from-peft.md, block {number + 1}", "exec"), names)
        if number == 0:
            losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
            assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.01
    merged = transformers.AutoModelForCausalLM.from_pretrained("outputs/merged")
    assert PeftModel.from_pretrained(merged, "outputs/lora").peft_config["default"].r == 8
    assert not any("serial_lora" in name for name, _ in merged.named_parameters())


def test_a_lora_of_peft_becomes_a_serial_adapter(tmp_path):
    model = TEXT["LlamaForCausalLM"].build()
    lora = get_peft_model(TEXT["LlamaForCausalLM"].build(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    lora.save_pretrained(tmp_path / "lora")
    report = compress_lora(model, tmp_path / "lora", rank=16)
    assert report.total_error < 0.9
    with pytest.raises(SerialLoraError, match="compress_lora"):
        load_serial_lora(TEXT["LlamaForCausalLM"].build(), tmp_path / "lora", weight_name="adapter_model.safetensors")
