"""The DreamBooth recipes for SD3 and PixArt, from their command lines, on stock pipelines and real photographs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from matplotlib import cbook
from PIL import Image
from safetensors.torch import load_file

from pipelines.generate_text_to_image import main as generate
from slora_diffusers.errors import SerialLoraError
from slora_diffusers.recipes import dreambooth_flux as train_dreambooth_flux
from slora_diffusers.recipes import dreambooth_pixart as train_dreambooth_pixart
from slora_diffusers.recipes import dreambooth_sd3 as train_dreambooth_sd3
from slora_diffusers.training import preflight
from slora_diffusers.training.diffusion.processes import Diffusion, RectifiedFlow
from tests.tiny.pipelines import tiny_flux_pipeline, tiny_pixart_pipeline, tiny_sd3_pipeline

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
RECIPES = {
    "sd3": train_dreambooth_sd3,
    "flux": train_dreambooth_flux,
    "alpha": train_dreambooth_pixart,
    "sigma": train_dreambooth_pixart,
}
PROMPT = "a photo of sks cat"
QUICK = {
    "rank": 4, "train_batch_size": 2, "resolution": 32, "validation_steps": 0, "checkpointing_steps": 0,
    "max_train_steps": 3, "validation_inference_steps": 2, "num_validation_images": 2, "max_sequence_length": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    tiny_sd3_pipeline().save_pretrained(folder / "sd3")
    tiny_flux_pipeline().save_pretrained(folder / "flux")
    for variant in ("alpha", "sigma"):
        tiny_pixart_pipeline(variant).save_pretrained(folder / variant)
    return folder


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Five crops of one photograph, four square and one wide."""
    folder = tmp_path_factory.mktemp("subject")
    photo = Image.open(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))).convert("RGB")
    for index, (x, y, side) in enumerate([(80, 20, 360), (100, 40, 300), (60, 60, 380), (120, 20, 330)]):
        photo.crop((x, y, x + side, y + side)).resize((48, 48)).save(folder / f"{index}.png")
    photo.crop((60, 60, 460, 260)).resize((96, 48)).save(folder / "wide.png")
    return folder


def train(family, bases, subject, out, **options):
    options = {**QUICK, "instance_prompt": PROMPT, **options}
    argv = ["--pretrained_model_name_or_path", str(bases / family), "--output_dir", str(out)]
    if "dataset_name" not in options:
        argv += ["--instance_data_dir", str(subject)]
    for name, value in options.items():
        if value is not None:
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return RECIPES[family].main(argv)


def log(out, name):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def drawing(base, out, *adapter):
    """Arguments of the generation script."""
    options = {"base": base, "prompts": PROMPT, "output": out, "height": 32, "width": 32, "steps": 2, "images": 2}
    argv = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return [*argv, "--max_sequence_length", "16", *(["--adapter", *map(str, adapter)] if adapter else [])]


def draw(base, out, *adapter):
    return np.array(Image.open(generate(drawing(base, out, *adapter))), dtype=int)


def draw_in_a_fresh_process(base, out, *adapter):
    script = Path(__file__).parents[1] / "pipelines" / "generate_text_to_image.py"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(script), *drawing(base, out, *adapter)]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return np.array(Image.open(out), dtype=int)


@pytest.mark.parametrize("family", ["sd3", "flux", pytest.param("alpha", marks=pytest.mark.slow), "sigma"])
def test_a_subject_is_learnt_and_a_fresh_pipeline_draws_what_the_run_drew(family, bases, subject, tmp_path):
    options = {"max_train_steps": 30, "validation_steps": 30, "learning_rate": 2e-2, "cache_latents": True}
    path = train(family, bases, subject, tmp_path / "learnt", **options)
    learnt = log(tmp_path / "learnt", "validation_loss")
    assert learnt[30] < 0.9 * learnt[0]
    first, last = (
        np.array(Image.open(tmp_path / "learnt" / "validation" / f"images-{step:06d}.png"), dtype=int)
        for step in (0, 30)
    )
    # A level apart at most: the run encodes each prompt once, by itself, and matrix products round by batch size.
    assert np.abs(draw(bases / family, tmp_path / "base.png") - first).max() <= 1
    adapted = draw(bases / family, tmp_path / "adapted.png", path)
    assert np.abs(adapted - last).max() <= 1
    assert np.abs(last - first).max() > 2
    if family == "sd3":
        assert draw_in_a_fresh_process(bases / family, tmp_path / "fresh.png", path).tolist() == adapted.tolist()
        # Stock diffusers computes the same from the exported LoRA.
        pipe = DiffusionPipeline.from_pretrained(bases / family)
        pipe.load_serial_lora(path)
        pipe.export_lora(tmp_path / "lora")
        stock = tiny_sd3_pipeline()
        stock.load_lora_weights(tmp_path / "lora")
        text = {"encoder_hidden_states": torch.randn(1, 5, 32), "pooled_projections": torch.randn(1, 32)}
        x, t = torch.randn(1, 4, 16, 16), torch.tensor([500.0])
        ours, theirs = (p.transformer(x, timestep=t, **text).sample for p in (pipe, stock))
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(family, bases, subject, tmp_path / "not", **{**options, "learning_rate": 0, "num_validation_images": 0})
    not_learnt = log(tmp_path / "not", "validation_loss")
    assert learnt[0] == not_learnt[0] == not_learnt[30]


def capture(module, monkeypatch):
    """What the transformer of a recipe is called with."""
    calls = []
    load = module.load_pipeline

    def watched(*arguments):
        pipe = load(*arguments)
        pipe.transformer.register_forward_pre_hook(
            lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        return pipe

    monkeypatch.setattr(module, "load_pipeline", watched)
    return calls


def test_sd3_reads_the_pipelines_own_embeddings_and_fp32_timesteps(bases, subject, tmp_path, monkeypatch):
    calls = capture(train_dreambooth_sd3, monkeypatch)
    train("sd3", bases, subject, tmp_path, max_train_steps=1, mixed_precision="bf16")
    ((noisy,), kwargs) = calls[0]
    pipe = DiffusionPipeline.from_pretrained(bases / "sd3", dtype=torch.bfloat16)
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(PROMPT, None, None, max_sequence_length=16)
    torch.testing.assert_close(kwargs["encoder_hidden_states"], embeds.repeat(2, 1, 1))
    torch.testing.assert_close(kwargs["pooled_projections"], pooled.repeat(2, 1))
    assert noisy.dtype == torch.bfloat16 and kwargs["timestep"].dtype == torch.float32
    assert kwargs["timestep"].min() > 0 and kwargs["timestep"].max() <= 1000


@pytest.mark.parametrize("variant", ["alpha", "sigma"])
def test_pixart_masks_the_padding_and_takes_sizes_only_where_it_was_trained_with_them(
    variant, bases, subject, tmp_path, monkeypatch
):
    calls = capture(train_dreambooth_pixart, monkeypatch)
    options = {"aspect_ratio_buckets": "32,32;16,32", "max_train_steps": 4, "train_batch_size": 1}
    train(variant, bases, subject, tmp_path, **options, max_sequence_length=20)
    pipe = DiffusionPipeline.from_pretrained(bases / variant)
    with torch.no_grad():
        embeds, mask, _, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=20)
    assert 0 < mask.sum() < 20
    shapes = set()
    for (noisy,), kwargs in calls:
        torch.testing.assert_close(kwargs["encoder_hidden_states"], embeds)
        assert kwargs["encoder_attention_mask"].equal(mask)
        height, width = 2 * noisy.shape[2], 2 * noisy.shape[3]
        shapes.add((height, width))
        added = kwargs["added_cond_kwargs"]
        if variant == "sigma":
            assert added == {"resolution": None, "aspect_ratio": None}
        else:
            assert added["resolution"].tolist() == [[height, width]]
            assert added["aspect_ratio"].tolist() == [[height / width]]
    assert shapes == {(32, 32), (16, 32)}


def test_t5_lengths_are_those_of_each_pixart(bases, subject, tmp_path, monkeypatch):
    lengths = []
    encode = train_dreambooth_pixart.encode_text

    def watched(pipe, text, length):
        lengths.append(length)
        return encode(pipe, text, 8)

    monkeypatch.setattr(train_dreambooth_pixart, "encode_text", watched)
    for variant, expected in (("alpha", 120), ("sigma", 300)):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(variant, bases, subject, tmp_path / variant, max_train_steps=1, max_sequence_length=None)
        assert set(lengths) == {expected}
        lengths.clear()


def test_dropped_captions_become_the_encoded_empty_prompt(bases, subject, tmp_path, monkeypatch):
    calls = capture(train_dreambooth_pixart, monkeypatch)
    train("sigma", bases, subject, tmp_path, max_train_steps=8, proportion_empty_prompts=0.5)
    pipe = DiffusionPipeline.from_pretrained(bases / "sigma")
    with torch.no_grad():
        embeds, mask, _, _ = pipe.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=16)
    empty = [torch.allclose(row, embeds[0]) for _, kw in calls for row in kw["encoder_hidden_states"]]
    masks = [row.equal(mask[0]) for _, kw in calls for row in kw["encoder_attention_mask"]]
    assert empty == masks and 2 <= sum(empty) <= 14


def test_the_losses_are_a_plain_flow_for_sd3_and_noise_alone_for_pixart(bases, subject, tmp_path, monkeypatch):
    made = []
    for module in (train_dreambooth_sd3, train_dreambooth_pixart):
        objective_for = module.objective_for
        monkeypatch.setattr(
            module, "objective_for", lambda *a, _make=objective_for, **k: made.append(_make(*a, **k)) or made[-1]
        )
    for family in ("sd3", "sigma"):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(family, bases, subject, tmp_path / family, max_train_steps=1)
    flow, diffusion = (objective.process for objective in made)
    assert isinstance(flow, RectifiedFlow) and flow.density == "logit_normal" and not flow.precondition
    assert flow.shift(torch.tensor(0.5)).item() == pytest.approx(0.75)  # the tiny base's scheduler shifts by 3
    assert isinstance(diffusion, Diffusion) and diffusion.sigma == "ignore" and diffusion.prediction_type == "epsilon"


@pytest.mark.parametrize(("family", "precision"), [("sd3", "bf16"), ("flux", "bf16"), ("sigma", "no")])
def test_missing_class_images_are_drawn_once_and_their_loss_is_added_with_its_weight(
    family, precision, bases, subject, tmp_path
):
    options = {
        "with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a photo of a cat",
        "num_class_images": 3, "max_train_steps": 1, "mixed_precision": precision,
    }  # fmt: skip
    losses, drawn = [], []
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / ".gitkeep").touch()
    for weight in (0.0, 0.5, 1.0):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(family, bases, subject, tmp_path / str(weight), **options, prior_loss_weight=weight)
        losses.append(log(tmp_path / str(weight), "loss")[1])
        drawn.append({path.name: path.read_bytes() for path in (tmp_path / "class").glob("*.png")})
    assert sorted(drawn[0]) == ["class-00000.png", "class-00001.png", "class-00002.png"]
    assert drawn[0] == drawn[1] == drawn[2]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4) and losses[1] > 1.1 * losses[0]


def test_text_encoders_train_to_the_same_weights_with_gradient_checkpointing(bases, subject, tmp_path):
    options = {"train_text_encoder": True, "learning_rate": 1e-2, "text_encoder_lr": 1e-2, "max_train_steps": 3}
    plain = load_file(train("sd3", bases, subject, tmp_path / "plain", **options))
    saving = load_file(train("sd3", bases, subject, tmp_path / "saving", **options, gradient_checkpointing=True))
    for name, tensor in plain.items():
        torch.testing.assert_close(saving[name], tensor, rtol=1e-4, atol=1e-6)


def test_text_encoders_learn_too_and_their_own_embeddings_equal_the_pipelines(bases, subject, tmp_path):
    options = {"train_text_encoder": True, "learning_rate": 1e-2, "text_encoder_lr": 1e-2, "max_train_steps": 5}
    path = train("sd3", bases, subject, tmp_path, **options)
    tensors = load_file(path)
    assert {key.split(".")[0] for key in tensors} == {"transformer", "text_encoder", "text_encoder_2"}
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        assert any(t.abs().max() > 0 for key, t in tensors.items() if key.startswith(f"{name}.") and "lora_B" in key)
    pipe = DiffusionPipeline.from_pretrained(bases / "sd3")
    texts = [PROMPT, ""]
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(texts, None, None, max_sequence_length=16)
        blank = {"prompt_embeds": torch.cat([torch.zeros_like(embeds[:, :77]), embeds[:, 77:]], dim=1)}
        own = train_dreambooth_sd3.encode_clip(pipe, (pipe.text_encoder, pipe.text_encoder_2), texts, blank)
    torch.testing.assert_close(own["prompt_embeds"], embeds)
    torch.testing.assert_close(own["pooled_prompt_embeds"], pooled)
    before = draw(bases / "sd3", tmp_path / "before.png")
    assert np.abs(draw(bases / "sd3", tmp_path / "after.png", path) - before).max() > 0


def test_a_folder_and_a_dataset_train_the_same(bases, subject, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = sorted(str(path) for path in subject.iterdir())
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    rows = datasets.Dataset.from_dict({"image": files, "text": [PROMPT] * len(files)}, features=features)
    rows.save_to_disk(tmp_path / "rows")
    train("sd3", bases, subject, tmp_path / "a")
    AcceleratorState._reset_state(reset_partial_state=True)
    train("sd3", bases, subject, tmp_path / "b", dataset_name=tmp_path / "rows")
    assert log(tmp_path / "a", "loss") == log(tmp_path / "b", "loss")


def test_encoders_are_gone_while_training_and_a_second_run_reads_the_caches(bases, subject, tmp_path, monkeypatch):
    seen, encoded = [], []
    fit = train_dreambooth_sd3.fit
    encode = train_dreambooth_sd3.encode_text

    def watched_encode(pipe, text, length):
        seen.append(pipe)
        encoded.append(text)
        return encode(pipe, text, length)

    def watched_fit(*arguments, **more):
        assert seen[0].text_encoder is None and seen[0].text_encoder_3 is None
        return fit(*arguments, **more)

    monkeypatch.setattr(train_dreambooth_sd3, "encode_text", watched_encode)
    monkeypatch.setattr(train_dreambooth_sd3, "fit", watched_fit)
    options = {"cache_latents": True, "encodings_dir": tmp_path / "cache"}
    first = load_file(train("sd3", bases, subject, tmp_path / "a", **options))
    count = len(encoded)
    monkeypatch.setattr(train_dreambooth_sd3, "fit", fit)
    again = load_file(train("sd3", bases, subject, tmp_path / "b", **options))
    assert count == 2 and len(encoded) == 2  # the prompt and the empty one
    assert all(first[key].equal(again[key]) for key in first)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_base_trains(quantize, bases, subject, tmp_path, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        # diffusers asks for a GPU, but bitsandbytes has learnt to compute on CPUs.
        monkeypatch.setattr(getattr(bnb_quantizer, name), "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(getattr(bnb_quantizer, name), "update_device_map", lambda *_: {"": "cpu"})
    monkeypatch.setattr(preflight, "has_gpu", lambda: True)
    kinds = set()
    fit = train_dreambooth_sd3.fit

    def watched(run, *arguments):
        kinds.update(type(module) for module in run.models["transformer"].modules())
        return fit(run, *arguments)

    monkeypatch.setattr(train_dreambooth_sd3, "fit", watched)
    path = train("sd3", bases, subject, tmp_path, quantize=quantize, learning_rate=1e-2, mixed_precision="bf16")
    assert {"nf4": bitsandbytes.nn.Linear4bit, "int8": bitsandbytes.nn.Linear8bitLt}[quantize] in kinds
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(tensor.abs().max() > 0 for key, tensor in tensors.items() if "lora_B" in key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"with_prior_preservation": True}, "--class_data_dir and --class_prompt"),
        ({"dataset_name": "x", "instance_data_dir": "y"}, "give one of"),
        ({"instance_data_dir": "/none"}, "/none is not a folder"),
        ({"resolution": 31}, "multiple of 4"),
        ({"resolution": 512}, "pixels a side"),
        ({"validation_loss_images": 0}, "--validation_loss_images must be at least 1"),
        ({"max_grad_norm": 0}, "--max_grad_norm must be above 0"),
        ({"output_dir": __file__}, "is a file"),
        ({"sample_batch_size": 0}, "--sample_batch_size must be at least 1"),
        ({"adam_beta1": 1.5}, r"--adam_beta1 must lie in \[0, 1\)"),
        ({"learning_rate": -1}, "--learning_rate must be at least 0"),
        ({"dataset_name": "nobody/nothing", "instance_data_dir": None}, "nobody/nothing cannot be opened"),
        ({"targets": "nothing"}, "nothing"),
        ({"quantize": "nf4"}, "--quantize nf4 needs a GPU"),
        ({"cache_latents": True, "no-center_crop": True}, "--cache_latents fixes the cut"),
    ],
)
def test_mistakes_are_found_before_training(options, message, bases, subject, tmp_path):
    with pytest.raises(SerialLoraError, match=message):
        train("sd3", bases, subject, tmp_path, **options)
