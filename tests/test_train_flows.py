"""The recipes for Sana, Qwen-Image, Z-Image, Lumina 2 and Wan, from their command lines, against stock pipelines."""

import importlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from matplotlib import cbook
from PIL import Image

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.recipes.flow import Family
from slora_diffusers.training.data.cache import encode_moments, sample_latents, vae_factor
from tests.tiny.flows import FLOWS

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
PROMPT, LENGTH = "a photo of sks cat", 24
NO_GUIDANCE = {
    "sana": {"guidance_scale": 1.0, "use_resolution_binning": False}, "qwen_image": {"true_cfg_scale": 1.0},
    "z_image": {"guidance_scale": 0.0}, "lumina2": {"guidance_scale": 1.0},
    "wan": {"guidance_scale": 1.0, "num_frames": 1},
}  # fmt: skip


def recipe(name):
    return importlib.import_module(f"slora_diffusers.recipes.dreambooth_{name}")


def family_of(name) -> Family:
    return next(value for value in vars(recipe(name)).values() if isinstance(value, Family))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name, make in FLOWS.items():
        make().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Three crops of one photograph."""
    folder = tmp_path_factory.mktemp("subject")
    photo = Image.open(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))).convert("RGB")
    for index, (x, y, side) in enumerate([(80, 20, 360), (100, 40, 300), (60, 60, 380)]):
        photo.crop((x, y, x + side, y + side)).resize((48, 48)).save(folder / f"{index}.png")
    return folder


class Stop(Exception):
    """The second step is enough."""


def second_step(name, pipe, prompt, seed=0):
    """What the stock pipeline reads and gives at its second step: latents, model output, timestep; (B, C, h, w)."""
    seen = []

    def step(output, t, sample, *args, **more):
        if not seen:
            seen.append(t)
            return (sample,)
        seen[:] = (output, t, sample)
        raise Stop

    pipe.scheduler.step = step
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "height": 32, "width": 32, "max_sequence_length": LENGTH, **NO_GUIDANCE[name]}
    with pytest.raises(Stop), torch.no_grad():
        pipe(prompt, generator=torch.Generator().manual_seed(seed), **call)
    output, t, sample = seen
    if name == "qwen_image":
        output, sample = (pipe._unpack_latents(x, 32, 32, pipe.vae_scale_factor) for x in (output, sample))
    return [x[:, :, 0] if x.ndim == 5 else x for x in (sample, output)], t


@pytest.mark.parametrize("name", FLOWS)
def test_the_velocity_is_what_the_stock_pipeline_gives_its_scheduler(name):
    """So sign, direction of time, packing, text and its padding are the pipeline's own."""
    pipe, family = FLOWS[name](), family_of(name)
    (sample, output), t = second_step(name, pipe, PROMPT)
    assert 100 < t < 990
    with torch.no_grad():
        text = family.encode(pipe, PROMPT, LENGTH)
        ours = family.velocity(pipe, pipe.transformer, sample, t.float().reshape(1), text)
    torch.testing.assert_close(ours, output.float(), rtol=1e-4, atol=1e-4)
    assert ours.shape == sample.shape and output.abs().max() > 1e-3


@pytest.mark.parametrize("name", FLOWS)
def test_texts_of_other_lengths_in_a_batch_change_nothing(name, bases, tmp_path):
    from slora_diffusers.training.diffusion.text_to_image import _stacked

    pipe, family = FLOWS[name](), family_of(name)
    texts = [family.encode(pipe, text, LENGTH) for text in (PROMPT, "a cat", "")]
    joined = {key: _stacked([text[key][0] for text in texts]) for key in texts[0]}
    size = 32 // vae_factor(pipe.vae)
    noisy, times = torch.randn(3, 4, size, size), torch.tensor([900.0, 500.0, 100.0])
    with torch.no_grad():
        together = family.velocity(pipe, pipe.transformer, noisy, times, joined)
        alone = [
            family.velocity(pipe, pipe.transformer, noisy[i : i + 1], times[i : i + 1], texts[i]) for i in range(3)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FLOWS)
def test_latents_are_what_the_pipelines_decode(name):
    """Decoding our clean latents by the pipeline's own arithmetic gives the VAE's reconstruction."""
    pipe = FLOWS[name]()
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    moments = encode_moments(pipe.vae, pixels)
    moments[:, moments.shape[1] // 2 :] = -30.0
    z0 = sample_latents(moments, pipe.vae.config, [torch.Generator().manual_seed(0)])
    config = pipe.vae.config
    with torch.no_grad():
        if name in ("qwen_image", "wan"):
            raw = pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()
            mean, std = (
                torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
            )
            torch.testing.assert_close(z0[:, :, None] * std + mean, raw, rtol=1e-4, atol=1e-4)
        else:
            encoded = pipe.vae.encode(pixels)
            raw = encoded.latent if name == "sana" else encoded.latent_dist.mode()
            theirs = z0 / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
            torch.testing.assert_close(theirs, raw, rtol=1e-4, atol=1e-4)
    assert z0.shape[-1] == 32 // vae_factor(pipe.vae)


def train(name, bases, subject, out, **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    quick = {
        "rank": 4, "train_batch_size": 3, "resolution": 32, "checkpointing_steps": 0, "validation_inference_steps": 2,
        "num_validation_images": 2, "max_sequence_length": LENGTH, "instance_prompt": PROMPT,
        "pretrained_model_name_or_path": bases / name, "instance_data_dir": subject, "output_dir": out, **options,
    }  # fmt: skip
    path = recipe(name).main([p for n, v in quick.items() for p in ((f"--{n}",) if v is True else (f"--{n}", str(v)))])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return path, {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


@pytest.mark.parametrize("name", FLOWS)
def test_a_subject_is_learnt_and_a_fresh_pipeline_draws_what_the_run_drew(name, bases, subject, tmp_path):
    options = {"max_train_steps": 20, "validation_steps": 20, "learning_rate": 2e-2, "cache_latents": True}
    path, losses = train(name, bases, subject, tmp_path, **options)
    assert losses[20] < 0.99 * losses[0]
    drawn = np.array(Image.open(tmp_path / "validation" / "images-000020.png"), dtype=int)
    pipe: Any = DiffusionPipeline.from_pretrained(bases / name)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_serial_lora(path)
    family = family_of(name)
    guidance = {"true_cfg_scale" if name == "qwen_image" else "guidance_scale": 4.0}
    call = {k: v for k, v in family.call.items() if k != "guidance"}
    from slora_diffusers.training.diffusion.validation import sample_generators

    output = pipe(
        [PROMPT] * 2, negative_prompt=["", ""], height=32, width=32, num_inference_steps=2,
        max_sequence_length=LENGTH, generator=sample_generators(0, 2), **guidance, **call,
    )  # fmt: skip
    images = output.images if hasattr(output, "images") else [frames[0] for frames in output.frames]
    fresh = np.concatenate([np.asarray(image, dtype=int) for image in images], axis=1)
    assert np.abs(fresh - drawn).max() <= 2


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_class_images_and_masks_work_there_too(name, bases, subject, tmp_path):
    (tmp_path / "masks").mkdir()
    for index in range(3):
        mask = Image.new("L", (48, 48))
        mask.paste(255, (0, 0, 48, 24))
        mask.save(tmp_path / "masks" / f"{index}.png")
    options = {
        "with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a cat",
        "num_class_images": 2, "class_inference_steps": 1, "max_train_steps": 1, "validation_steps": 0,
        "mask_data_dir": tmp_path / "masks",
    }  # fmt: skip
    path, _ = train(name, bases, subject, tmp_path / "out", **options)
    assert path.exists() and len(list((tmp_path / "class").glob("*.png"))) == 2


def test_wan_2_2_is_refused_in_a_sentence(bases, subject, tmp_path):
    pipe = FLOWS["wan"]()
    pipe.register_modules(transformer_2=FLOWS["wan"](seed=1).transformer)
    pipe.save_pretrained(tmp_path / "wan")
    with pytest.raises(SerialLoraError, match=r"trains Wan 2\.1"):
        train("wan", tmp_path, subject, tmp_path / "out")
