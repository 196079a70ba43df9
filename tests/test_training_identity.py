"""Identity is content: every cache, pairing and key of training follows what a thing is, never what it is called."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import AddedToken

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.training.checkpoint import STATE_NAME, find_checkpoint
from slora_diffusers.training.data.cache import Latents, TensorCache, cache_texts, encode_moments
from slora_diffusers.training.data.folders import find_images
from slora_diffusers.training.data.identity import component_key, key_of, model_key, pipeline_key
from slora_diffusers.training.data.images import to_pixels
from slora_diffusers.training.diffusion.class_images import ClassImages
from tests.tiny.pipelines import tiny_flux_pipeline, tiny_pixart_pipeline, tiny_sd3_pipeline, tiny_vae
from train_scripts import train_dreambooth_pixart, train_dreambooth_sd3

RECIPES = {"sd3": train_dreambooth_sd3, "sigma": train_dreambooth_pixart}
SHAPE = (16, 16)


def pictures(folder, seed, count=3, size=(40, 40)):
    """Files 0.png, 1.png, ... whose pixels follow the seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng((seed, index)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


# --- keys ---


def test_a_models_key_follows_every_value_of_every_weight():
    vae = tiny_vae()
    keys = {model_key(vae)}
    random = np.random.default_rng(0)
    weights = list(vae.state_dict().values())
    for count, weight in enumerate([*weights, *weights], start=2):
        flat, place = weight.view(-1), random.integers(weight.numel())
        flat[place] = torch.nextafter(flat[place], torch.tensor(9.0))  # the last bit of one value
        keys.add(model_key(vae))
        assert len(keys) == count
    assert model_key(tiny_vae()) == model_key(tiny_vae())
    assert model_key(tiny_vae().to(torch.bfloat16)) != model_key(tiny_vae())


def test_a_model_that_cannot_be_read_has_no_key():
    with pytest.raises(SerialLoraError, match="offloaded"):
        model_key(tiny_vae().to("meta"))


def test_keys_tell_apart_parts_that_join_to_the_same_text():
    parts = [("a", "b"), ("ab",), ("a b",), (b"a", "b"), ("a", "b", ""), (["a", "b"],), (torch.zeros(2),), (0, 0)]
    assert len({key_of(*part) for part in parts}) == len(parts)


PARTS = {
    "weights of an encoder": lambda pipe: pipe.text_encoder.get_input_embeddings().weight.data[3].add_(1),
    "weights of the last encoder": lambda pipe: next(pipe.text_encoder_3.parameters()).data.add_(1),
    "a token of a tokenizer": lambda pipe: pipe.tokenizer.add_tokens([AddedToken("sks cat")]),
    "the length of a tokenizer": lambda pipe: setattr(pipe.tokenizer, "model_max_length", 33),
    "the side that a tokenizer pads": lambda pipe: setattr(pipe.tokenizer_3, "padding_side", "left"),
    "an encoder that is not there": lambda pipe: pipe.register_modules(text_encoder_3=None),
}


@pytest.mark.parametrize("change", PARTS)
def test_the_key_of_texts_follows_all_that_makes_an_embedding(change):
    pipe = tiny_sd3_pipeline()
    without = ("transformer", "vae", "scheduler")
    before = pipeline_key(pipe, *without)
    assert before == pipeline_key(tiny_sd3_pipeline(), *without)
    pipe.transformer.proj_out.weight.data.add_(1)
    assert pipeline_key(pipe, *without) == before != pipeline_key(pipe)
    PARTS[change](pipe)
    assert pipeline_key(pipe, *without) != before


def test_every_component_of_a_pipeline_has_a_key_of_its_own():
    for make in (tiny_sd3_pipeline, tiny_flux_pipeline, tiny_pixart_pipeline):
        ours, again, other = ({n: component_key(c) for n, c in make(seed=s).components.items()} for s in (0, 0, 1))
        assert ours == again
        models = [n for n, c in make().components.items() if isinstance(c, torch.nn.Module)]
        assert len({ours[n] for n in models}) == len(models) and all(ours[n] != other[n] for n in models)


# --- caches ---


def test_images_of_one_name_have_latents_of_their_own_and_copies_of_one_image_share_them(tmp_path):
    """Whatever a run holds at once: the subject's, the class's and the held-out images, in any order."""
    vae, cache = tiny_vae(), TensorCache(tmp_path / "cache")
    folders = [pictures(tmp_path / name, seed) for seed, name in enumerate(("subject", "class", "held out"))]
    (tmp_path / "copies").mkdir()
    for index in range(3):  # under other names, and as other files of the same pixels
        Image.open(folders[0] / f"{index}.png").save(tmp_path / "copies" / f"copy-{2 - index}.bmp")
    latents = Latents(vae, cache, False, True, torch.device("cpu"))
    groups = [find_images(folder, prompt="x").items for folder in (*folders, tmp_path / "copies")]
    for items in groups:
        latents.fill(items, [[SHAPE]] * 3)
    assert len(cache) == 3 * 3 * 2  # and their mirror images
    for items in groups:
        for item in items:
            expected = to_pixels(item.read(), SHAPE)[None]
            for seed in range(4):
                flipped = bool(torch.rand(1, generator=torch.Generator().manual_seed(seed)) < 0.5)
                read = latents.fetch(item, SHAPE, torch.Generator().manual_seed(seed))
                pixels = expected.flip(-1) if flipped else expected
                torch.testing.assert_close(read[None], encode_moments(vae, pixels), rtol=1e-4, atol=1e-4)


def test_a_latent_follows_pixels_shape_mirror_and_vae_and_nothing_else(tmp_path):
    cache = TensorCache()
    (item,) = find_images(pictures(tmp_path / "a", 0, count=1), prompt="x").items
    (other,) = find_images(pictures(tmp_path / "b", 1, count=1), prompt="x").items
    changed = tiny_vae()
    changed.encoder.conv_in.weight.data.view(-1)[7] += 1e-3

    def entries(item, shape, vae, flip=False):
        Latents(vae, cache, False, flip, torch.device("cpu")).fill([item], [[shape]])
        return len(cache)

    assert entries(item, SHAPE, tiny_vae()) == 1
    assert entries(replace(item, name="9.png", caption="y", label=3), SHAPE, tiny_vae()) == 1
    assert entries(replace(other, name=item.name), SHAPE, tiny_vae()) == 2
    assert entries(item, (16, 24), tiny_vae()) == 3
    assert entries(item, SHAPE, tiny_vae(), flip=True) == 4
    assert entries(item, SHAPE, changed) == 5
    assert entries(item, SHAPE, tiny_vae(scaling_factor=0.5)) == 6


def test_a_text_follows_its_letters_and_its_maker(tmp_path):
    cache = TensorCache(tmp_path)
    texts = ["a cat", "a cat ", "A cat", "a\ncat", ""]
    keys = [cache_texts(cache, texts, lambda text: {"e": torch.zeros(1)}, maker) for maker in ("one", "two")]
    assert len({key for by_text in keys for key in by_text.values()}) == 2 * len(texts)


def run(family, bases, subject, out, **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    quick = {
        "rank": 4, "train_batch_size": 2, "resolution": 32, "validation_steps": 2, "checkpointing_steps": 0,
        "max_train_steps": 2, "num_validation_images": 0, "max_sequence_length": 16, "class_inference_steps": 1,
    }  # fmt: skip
    paths = {"pretrained_model_name_or_path": bases / family, "instance_data_dir": subject, "output_dir": out}
    flags = {**quick, **paths, "instance_prompt": "a photo of sks cat", **options}
    RECIPES[family].main(
        [part for n, v in flags.items() for part in ((f"--{n}",) if v is True else (f"--{n}", str(v)))]
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines for name in ("loss", "validation_loss") if name in line]


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("family", RECIPES)
def test_caching_changes_no_loss_where_subject_class_and_held_out_images_share_their_names(
    family, text_bases, tmp_path
):
    subject, unseen, others = (pictures(tmp_path / n, seed) for seed, n in enumerate(("subject", "unseen", "class")))
    options = {
        "with_prior_preservation": True, "class_data_dir": others, "class_prompt": "a photo of a cat",
        "num_class_images": 3, "validation_data_dir": unseen,
    }  # fmt: skip
    fresh = run(family, text_bases, subject, tmp_path / "fresh", **options)
    cached = run(family, text_bases, subject, tmp_path / "cached", **options, cache_latents=True)
    assert cached == pytest.approx(fresh, rel=1e-4)
    same = run(family, text_bases, subject, tmp_path / "same", **{**options, "validation_data_dir": subject})
    assert same[-1] != pytest.approx(fresh[-1], rel=1e-5)  # the held-out loss is of the held-out images


# --- class images ---


def tagged(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.usefixtures("fresh_accelerator")
def test_class_images_are_drawn_anew_after_what_draws_them_has_changed_and_only_then(text_bases, tmp_path, caplog):
    subject, folder = pictures(tmp_path / "subject", 0), tmp_path / "class"
    options = {
        "with_prior_preservation": True, "class_data_dir": folder, "class_prompt": "a cat", "num_class_images": 2,
        "max_train_steps": 1, "validation_steps": 0,
    }  # fmt: skip
    changed = tmp_path / "changed"
    pipe = DiffusionPipeline.from_pretrained(text_bases / "sd3")
    pipe.transformer.proj_out.weight.data += 0.1
    pipe.save_pretrained(changed / "sd3")
    seen = 0
    for number, (other, base, drawn) in enumerate([
        ({}, text_bases, 2),
        ({"validation_inference_steps": 1, "rank": 2, "seed": 5}, text_bases, 0),  # of the run, not of the class images
        ({"class_prompt": "a dog"}, text_bases, 2),
        ({}, text_bases, 0),  # the first ones are still there
        ({"class_inference_steps": 2}, text_bases, 2),
        ({"class_guidance_scale": 3.5, "resolution": 16}, text_bases, 2),
        ({}, changed, 2),
        ({"num_class_images": 3}, text_bases, 1),
    ]):  # fmt: skip
        before = tagged(folder) if folder.exists() else {}
        run("sd3", base, subject, tmp_path / str(number), **{**options, **other})
        after = tagged(folder)
        seen += drawn
        assert len(after) == seen and before.items() <= after.items(), number
    assert "not used" in caplog.text


def test_ones_own_class_images_are_used_and_those_of_another_key_are_not(tmp_path):
    folder = pictures(tmp_path, 0, count=2)
    images = ClassImages(folder, "a cat", 4, key_of("today"))
    images._save(Image.new("RGB", (8, 8)), folder / "class-00000.png")
    replace(images, made_by=key_of("before"))._save(Image.new("RGB", (8, 8)), folder / "class-00001.png")
    found = images.find()
    assert [item.name for item in found] == ["0.png", "1.png", "class-00000.png"]
    assert {item.caption for item in found} == {"a cat"}


# --- checkpoints ---


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_resumed_run_says_when_its_images_are_others_under_the_same_names(text_bases, tmp_path, caplog):
    subject = pictures(tmp_path / "subject", 0)
    options = {"checkpointing_steps": 1, "validation_steps": 0}
    run("sd3", text_bases, subject, tmp_path / "out", **options)
    resumed = {**options, "max_train_steps": 3, "resume_from_checkpoint": "latest"}
    caplog.clear()
    run("sd3", text_bases, subject.rename(tmp_path / "moved"), tmp_path / "out", **resumed)
    assert "the images, captions and weights are not those" not in caplog.text
    pictures(tmp_path / "moved", 7, count=1)
    run("sd3", text_bases, tmp_path / "moved", tmp_path / "out", **{**resumed, "max_train_steps": 4})
    assert "the images, captions and weights are not those" in caplog.text


def test_a_checkpoint_that_may_be_one_of_two_is_asked_for_by_its_whole_path(tmp_path, monkeypatch):
    for folder in (tmp_path / "here", tmp_path / "out"):
        (folder / "checkpoint-1").mkdir(parents=True)
        (folder / "checkpoint-1" / STATE_NAME).touch()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(SerialLoraError, match="give the whole path of one"):
        find_checkpoint(tmp_path / "out", "checkpoint-1")
    assert (
        find_checkpoint(tmp_path / "out", str(tmp_path / "out" / "checkpoint-1")) == tmp_path / "out" / "checkpoint-1"
    )
    monkeypatch.chdir(tmp_path / "out")
    assert find_checkpoint(tmp_path / "out", "checkpoint-1") is not None
