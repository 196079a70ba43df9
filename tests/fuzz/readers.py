"""Every way in for a file of somebody else's: adapters, LoRAs, heads, options, checkpoints."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import slora_diffusers as sl
from slora_diffusers.cli.console import show
from slora_diffusers.cli.describe import inspect_adapter, tables
from slora_diffusers.convert.merge import merge_files
from slora_diffusers.files.format import AdapterFile
from slora_diffusers.heads.backbones import layer_features
from slora_diffusers.training.checkpoint import STATE_NAME
from tests.adapters import add_random_adapter, traces
from tests.fuzz.damage import Tensors, damage_bytes, damage_file, damage_json, damage_tensor, damage_tree
from tests.fuzz.judge import Reader
from tests.test_vision import classifier, pixels, segmenter, shaken
from tests.test_vision_promptable import make as promptable
from tests.test_vision_prompts import make as prompts
from tests.tiny.models import TINY
from tests.tiny.pipelines import tiny_dit_pipeline
from tests.tiny.vision import VISION
from train_scripts import train_dit

NAME = "DiTTransformer2DModel"


def contents(model: nn.Module) -> tuple[Any, ...]:
    """All that a verb may change: weights to the bit, hooks, attributes, and what the adapters' status says."""
    digest = [(key, str(t.dtype), _bits(t)) for key, t in model.state_dict().items()]
    return repr(traces(model)), tuple(digest), str(sl.serial_lora_status(model))


CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"rank_pattern": {r".*\.1\.attn1": 2}, "alpha_pattern": {r".*\.0\..*": 3.0}, "layers": [0, 1]},
    {
        "targets": [r".*attn1"],
        "exclude": [r".*\.9\..*"],
        "inputs": ["hidden_states", "attention_output"],
        "rslora": True,
    },
)


def adapter_file(r: Random, folder: Path) -> Path:
    """A damaged adapter's file."""
    config = r.choice(CONFIGS)
    key = json.dumps(config)
    path = folder / "adapter.safetensors"
    path.write_bytes(damage_file(r, _whole(folder, key)))
    return path


@cache
def _whole(folder: Path, key: str) -> Tensors:
    model = TINY[NAME].build()
    add_random_adapter(model, **json.loads(key))
    return Tensors.read(sl.save_serial_lora(model, folder / "whole"))


def load_into_a_model() -> Reader:
    """`load_serial_lora` beside an adapter that is there."""
    model = TINY[NAME].build()
    add_random_adapter(model, "held")
    return Reader(
        adapter_file,
        lambda path: sl.load_serial_lora(model, path, "new", strict=path.stat().st_size % 2 == 0),
        lambda: contents(model),
        lambda: (sl.delete_serial_lora(model, "new"), sl.set_serial_lora(model, "held")),
    )


def load_into_a_bare_model() -> Reader:
    """`load_serial_lora` into a model without any adapter."""
    model = TINY[NAME].build()
    return Reader(
        adapter_file, lambda path: sl.load_serial_lora(model, path), lambda: contents(model),
        lambda: sl.unload_serial_lora(model),
    )  # fmt: skip


def load_a_state_dict() -> Reader:
    """`load_serial_lora` of a mapping that somebody else made."""
    model = TINY[NAME].build()

    def write(r: Random, folder: Path) -> Any:
        state = _whole(folder, "{}").tensors
        return damage_tree(
            r, dict(state), lambda r: r.choice((None, 3, "x", {}, torch.zeros(3), torch.zeros(2, 2).int()))
        )

    return Reader(
        write, lambda state: sl.load_serial_lora(model, state), lambda: contents(model),
        lambda: sl.unload_serial_lora(model),
    )  # fmt: skip


def load_into_a_pipeline() -> Reader:
    """A pipeline's `load_serial_lora`."""
    pipe = tiny_dit_pipeline()
    whole: dict[Path, Tensors] = {}

    def write(r: Random, folder: Path) -> Path:
        if folder not in whole:
            other = tiny_dit_pipeline()
            add_random_adapter(other.transformer)
            whole[folder] = Tensors.read(other.save_serial_lora(folder / "whole-pipeline"))
        path = folder / "pipeline.safetensors"
        path.write_bytes(damage_file(r, whole[folder]))
        return path

    return Reader(
        write, pipe.load_serial_lora, lambda: contents(pipe.transformer), pipe.unload_serial_lora
    )  # fmt: skip


def inspect() -> Reader:
    """`slora inspect`, with and without the base, as tables and as JSON."""
    model = TINY[NAME].build()

    def read(path: Path) -> None:
        report = inspect_adapter(str(path), model if path.stat().st_size % 2 else None)
        with contextlib.redirect_stdout(io.StringIO()):
            tables(report)
            show(report, True)

    return Reader(adapter_file, read, lambda: contents(model))


def merge() -> Reader:
    """`slora merge`: a damaged adapter with a whole one."""

    def write(r: Random, folder: Path) -> Any:
        path = adapter_file(r, folder)
        good = folder / "good.safetensors"
        if not good.exists():
            good.write_bytes(_whole(folder, "{}").to_bytes())
        return (good, path, None) if r.random() < 0.5 else (path, path, 2)

    def read(given: Any) -> None:
        one, other, rank = given
        merge_files([AdapterFile.read(one), AdapterFile.read(other)], [0.5, 2.0], rank)

    return Reader(write, read)


def _loras(folder: Path) -> list[Tensors]:
    """A LoRA of the tiny model in the layouts of diffusers, PEFT and kohya, with their headers."""
    generator = torch.Generator().manual_seed(0)
    found: list[dict[str, Tensor]] = [{}, {}, {}]
    for i in (0, 1):
        for name in ("to_q", "to_v", "to_out.0"):
            A, B = torch.randn(2, 16, generator=generator), torch.randn(16, 2, generator=generator)
            path = f"transformer_blocks.{i}.attn1.{name}"
            flat = f"lora_unet_{path.replace('.', '_')}"
            found[0] |= {f"transformer.{path}.lora_A.weight": A, f"transformer.{path}.lora_B.weight": B}
            found[1] |= {f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B}
            found[2] |= {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B, f"{flat}.alpha": torch.tensor(1.0)}
    settings = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"attn1.to_q": 8}, "use_rslora": False, "use_dora": False}
    nested = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    return [Tensors(found[0], {"format": "pt", "lora_adapter_metadata": nested}), Tensors(found[1]), Tensors(found[2])]


def compress() -> Reader:
    """`compress_lora` of a damaged LoRA, with PEFT's own settings beside it in a folder."""
    model = TINY[NAME].build()

    def write(r: Random, folder: Path) -> Path:
        kind = r.randrange(3)
        whole = _loras(folder)[kind]
        if kind != 1:
            path = folder / "lora.safetensors"
            path.write_bytes(damage_file(r, whole))
            return path
        peft = folder / "peft"
        peft.mkdir(exist_ok=True)
        settings = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"attn1.to_q": 8}, "use_rslora": False, "use_dora": False}
        text, data = json.dumps(settings), whole.to_bytes()
        if r.random() < 0.5:
            text = damage_json(r, settings)
        else:
            data = damage_file(r, whole)
        (peft / "adapter_config.json").write_text(text, encoding="utf-8", errors="replace")
        (peft / "adapter_model.safetensors").write_bytes(data)
        return peft

    return Reader(
        write, lambda path: sl.compress_lora(model, path, 2), lambda: contents(model),
        lambda: sl.unload_serial_lora(model),
    )  # fmt: skip


def _head(make: Callable[[], Any], base: Callable[[], nn.Module]) -> Reader:
    trained = shaken(make())
    backbone = base()
    whole: dict[Path, Tensors] = {}

    def write(r: Random, folder: Path) -> Path:
        if folder not in whole:
            whole[folder] = Tensors.read(trained.save_pretrained(folder / type(trained).__name__))
        path = folder / "head.safetensors"
        path.write_bytes(damage_file(r, whole[folder]))
        return path

    def read(path: Path) -> None:
        type(trained).from_pretrained(path, backbone=backbone)

    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}

    def undo() -> None:
        sl.unload_serial_lora(backbone)
        backbone.load_state_dict(before)  # a mask decoder is a part of the base that the file replaces
        backbone.requires_grad_(False).eval()

    return Reader(write, read, lambda: contents(backbone), undo)


def yaml_options() -> Reader:
    """`--config` of a recipe, up to where it looks for the base: that there is none is the sign that all was taken."""
    values: dict[str, Any] = {
        **{"pretrained_model_name_or_path": "nowhere", "glyphs": "script", "rank": 4, "alpha": 8.0, "dropout": 0.1},
        **{"learning_rate": 1e-3, "layers": [0, 1], "inputs": ["hidden_states"], "targets": [".*attn1"], "seed": 3},
        **{"max_train_steps": 3, "use_ema": True, "ema_decay": 0.9, "lr_scheduler": "cosine", "optimizer": "adamw"},
        **{"mixed_precision": "no", "output_dir": "out", "train_batch_size": 2, "aspect_ratio_buckets": "16,32"},
        **{"weighting_scheme": "none", "validation_steps": 0, "checkpointing_steps": 0, "adam_beta1": 0.9},
    }

    def write(r: Random, folder: Path) -> Path:
        path = folder / "options.yaml"
        how = r.randrange(10)
        text = yaml.safe_dump(values)
        if how < 7:
            try:
                text = yaml.safe_dump(damage_tree(r, values))
            except (yaml.YAMLError, RecursionError, UnicodeError):
                text = json.dumps(values)
        elif how < 9:
            lines = text.splitlines()
            lines.insert(r.randrange(len(lines)), r.choice(_ODD_LINES))
            text = "\n".join(lines)
        data = text.encode("utf-8", "replace")
        path.write_bytes(damage_bytes(r, data) if how == 9 else data)
        return path

    def read(path: Path) -> None:
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.chdir(path.parent):
                train_dit.main(["--config", str(path)])
        except SystemExit:
            return  # argparse has printed the usage and what is wrong
        except sl.SerialLoraError as error:
            if "nowhere" not in str(error):
                raise

    return Reader(write, read)


_ODD_LINES = (
    *("rank: 2001-01-01", "rank: 0x1F", "rank: 1_000", "rank: .nan", "rank: 1:30", "rank: 1e400", "rank: ~"),
    *("rank: !!int x", "rank: " + "9" * 5000, "alpha: " + "9" * 400, "learning_rate: .nan", "learning_rate: .inf"),
    *("learning_rate: -1", "layers: [[0]]", "layers: {0: 1}", "layers: 0-3", "inputs: !!set {a}", "<<: {rank: 3}"),
    *("x: !!python/object/apply:os.getpid []", "a: &a [*a]", "rank: &b {c: *b}", "? [1, 2]\n: 3", "1: 2", "null: 1"),
    *("'': 1", "--rank: 4", "\trank: 4", "a: &x ['l','l']\nb: &y [*x,*x,*x,*x]\nc: &z [*y,*y,*y,*y]", "[" * 3000),
    *("seed: -1", "seed: 1.5", "rank: '4'", "targets: '([\\w.]+)+!'", "targets: '['", "dropout: true", "use_ema: 1"),
    *("use_ema: maybe", "config: other.yaml", "%YAML 9.9", "---\nrank: 2\n---\nrank: 3", "rank: !!binary aGk="),
    *("ema_decay: 1.0", "output_dir: ''", "report_to: [all]", "mixed_precision: fp8", "resolution: 1" + "0" * 30),
    *("logging_dir: 3", "lr_warmup_steps: -5", "\x07: 3", "aspect_ratio_buckets: '0,0'", "aspect_ratio_buckets: 'x'"),
    *("aspect_ratio_buckets: '16'", "snr_gamma: 0", "seed: 1" + "0" * 30, "max_train_steps: 1" + "0" * 400),
)


def resume() -> Reader:
    """`--resume_from_checkpoint` of a damaged checkpoint, in a run of a tiny DiT."""
    whole: dict[Path, Any] = {}

    def argv(folder: Path, steps: int) -> list[str]:
        flags = {"pretrained_model_name_or_path": folder / "base", "output_dir": folder / "run", "glyphs": "script"}
        flags |= {"glyph_variations": 1, "train_batch_size": 2, "rank": 2, "max_train_steps": steps}
        flags |= {"validation_steps": 0, "checkpointing_steps": 1}
        return [part for name, value in flags.items() for part in (f"--{name}", str(value))]

    def write(r: Random, folder: Path) -> Path:
        path = folder / "run" / "checkpoint-1" / STATE_NAME
        if folder not in whole:
            tiny_dit_pipeline().save_pretrained(folder / "base")
            with contextlib.redirect_stderr(io.StringIO()):
                train_dit.main(argv(folder, 1))
            whole[folder] = torch.load(path, weights_only=True), path.read_bytes()
        state, data = whole[folder]
        if r.random() < 0.2:
            path.write_bytes(damage_bytes(r, data))
        else:
            torch.save(damage_tree(r, state, lambda r: _any_leaf(r, state)), path)
        return folder

    def read(folder: Path) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            train_dit.main([*argv(folder, 2), "--resume_from_checkpoint", "checkpoint-1"])

    return Reader(write, read)


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _any_leaf(r: Random, state: Any) -> Any:
    tensor = r.choice(list(state["trained"].values()))
    return r.choice(
        (None, 3, -1, 10**30, 0.5, "x", {}, [], float("nan"), damage_tensor(r, tensor), damage_tensor(r, tensor))
    )


READERS: dict[str, Callable[[], Reader]] = {
    "load": load_into_a_model,
    "load into a bare model": load_into_a_bare_model,
    "load a state dict": load_a_state_dict,
    "load into a pipeline": load_into_a_pipeline,
    "inspect": inspect,
    "merge": merge,
    "compress": compress,
    "classification head": lambda: _head(classifier, VISION["Dinov2Model"].build),
    "segmentation head": lambda: _head(lambda: segmenter(head="convolutional", width=8), _dinov2),
    "promptable head": lambda: _head(lambda: promptable("sam"), _sam),
    "prompt head": lambda: _head(prompts, VISION["CLIPModel"].build),
    "yaml": yaml_options,
    "resume": resume,
}

SHARES = {
    **{"load": 0.2, "load into a bare model": 0.1, "load a state dict": 0.05, "load into a pipeline": 0.05},
    **{"inspect": 0.1, "merge": 0.1, "compress": 0.1, "classification head": 0.06, "segmentation head": 0.04},
    **{"promptable head": 0.02, "prompt head": 0.02, "yaml": 0.14, "resume": 0.02},
}
"""How many of all inputs a reader gets: those that take a forward, or a run, get fewer."""


def _dinov2() -> nn.Module:
    model = VISION["Dinov2Model"].build()
    layer_features(model, pixels())  # transformers puts hooks of its own on a model that gave its hidden states once
    return model


def _sam() -> nn.Module:
    from tests.test_vision_promptable import MODELS

    return MODELS["sam"][0].build()
