"""The demo's base is a stock pipeline that draws letters; fine-tuning reads what it may and measures what it says."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel

from slora_diffusers import SerialLoraConfig, add_serial_lora
from slora_diffusers.demo.adapt import (
    BASE,
    NULL_CLASS,
    Setting,
    denoising_loss,
    evaluate,
    finetune,
    generate,
    load_base,
)
from slora_diffusers.demo.glyphs import (
    CORE_FACES,
    HELD_OUT_LETTERS,
    LETTERS,
    NEW_STYLES,
    SEEN_LETTERS,
    Jitter,
    glyph_images,
)
from slora_diffusers.demo.metrics import best_iou, nearest_glyph

STYLE = NEW_STYLES["calligraphic"]
BRIEF = Setting(learning_rate=3e-3, steps=2, batch_size=4, variations=2)


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    """What the base draws: two samples of every letter, (2, 26, 32, 32)."""
    return generate(load_base(), range(2))


def trainable(pipe):
    return [p for p in pipe.transformer.parameters() if p.requires_grad]


def test_base_is_a_stock_pipeline_of_at_most_ten_megabytes():
    assert sum(file.stat().st_size for file in BASE.rglob("*") if file.is_file()) <= 10_000_000
    pipe = DiTPipeline.from_pretrained(BASE)
    assert type(pipe.transformer) is DiTTransformer2DModel and type(pipe.vae) is AutoencoderKL
    assert pipe.scheduler.config.prediction_type == "flow_prediction"
    assert pipe.get_label_ids(["A", "Z"]) == [0, 25]
    assert pipe([0], num_inference_steps=2).images[0].size == (32, 32)


def test_vae_gives_glyphs_back_and_standardised_latents():
    pipe = load_base()
    images, _ = glyph_images(CORE_FACES[:4])
    pixels = (images.float() / 127.5 - 1)[:, None].repeat(1, 3, 1, 1)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode()
        decoded = pipe.vae.decode(latents).sample
    assert (decoded - pixels).square().mean().sqrt() < 0.06  # of a range of 2
    assert abs(latents.mean()) < 0.25 and 0.75 < latents.std() < 1.25


def test_base_draws_the_letter_that_it_is_asked_for(drawn):
    faces = torch.stack([glyph_images([face])[0] / 255 for face in CORE_FACES])  # (16, 26, H, W)
    letters = torch.stack([nearest_glyph(row, faces.flatten(0, 1)) % len(LETTERS) for row in drawn])
    assert (letters == torch.arange(26)).float().mean() > 0.7  # chance is 1 in 26


def test_generation_repeats_from_the_seed(drawn):
    again = generate(load_base(), [1], letters=LETTERS)
    torch.testing.assert_close(again[0], drawn[1], atol=1e-5, rtol=0)


def test_fine_tuning_reads_no_held_out_letter():
    pipe = load_base()
    labels, allowed = [], {LETTERS.index(letter) for letter in SEEN_LETTERS} | {NULL_CLASS}
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: labels.extend(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    setting = Setting(learning_rate=3e-4, steps=4, label_dropout=0.1)
    list(finetune(pipe, pipe.transformer.parameters(), STYLE, setting))
    assert len(labels) == 4 * setting.batch_size
    assert set(labels) <= allowed and NULL_CLASS in labels and len(set(labels)) > 10


def test_the_class_that_stands_for_none_is_left_to_the_base_unless_labels_are_dropped():
    pipe, labels = load_base(), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: labels.extend(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    list(finetune(pipe, pipe.transformer.parameters(), STYLE, replace(BRIEF, batch_size=64)))
    assert len(labels) == 128 and NULL_CLASS not in labels


def test_fine_tuning_moves_glyphs_and_changes_nothing_else():
    glyph, moved = glyph_images([STYLE], "H")[0][0], glyph_images([STYLE], "H", 8, 0, Jitter.moved)[0]
    assert len(moved.flatten(1).unique(dim=0)) == 8
    torch.testing.assert_close(moved.float().sum((1, 2)), glyph.float().sum().expand(8), rtol=0.03, atol=0)
    for axis in (1, 2):  # as wide and as high as it was, but for what lies between two pixels
        extents = (torch.cat([glyph[None], moved]) > 127).any(axis).sum(1)
        assert (extents - extents[0]).abs().max() <= 1


def test_every_method_sees_the_same_batches():
    seen: list[list[torch.Tensor]] = []
    for prepare in (lambda model: None, lambda model: add_serial_lora(model, SerialLoraConfig(rank=2))):
        pipe, inputs = load_base(), []
        prepare(pipe.transformer)
        pipe.transformer.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0].clone()))
        list(finetune(pipe, trainable(pipe), STYLE, BRIEF))
        seen.append(inputs)
    assert torch.equal(torch.stack(seen[0]), torch.stack(seen[1]))


def test_fine_tuning_with_an_adapter_leaves_the_base_as_it_was():
    pipe, reference = load_base(), load_base()
    add_serial_lora(pipe.transformer, SerialLoraConfig(rank=2))
    losses = list(finetune(pipe, trainable(pipe), STYLE, replace(BRIEF, steps=3)))
    assert len(losses) == 3
    adapted = pipe.transformer.state_dict()
    for name, tensor in reference.transformer.state_dict().items():
        assert torch.equal(adapted[name], tensor), name
    assert any(tensor.abs().sum() > 0 for name, tensor in adapted.items() if "lora_B" in name)


def test_denoising_loss_is_the_mean_squared_velocity_error():
    pipe = load_base()
    x = (glyph_images([STYLE], "B")[0].float() / 127.5 - 1)[:, None].repeat(1, 3, 1, 1)
    inputs = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args[0], kwargs)), with_kwargs=True
    )
    measured = denoising_loss(pipe, STYLE, "B", times=2, seed=3)
    with torch.no_grad():
        x0 = pipe.vae.encode(x).latent_dist.mode().double()
        errors = []
        for (xt, kwargs), sigma in zip(list(inputs), (0.25, 0.75), strict=True):
            noise = (xt.double() - (1 - sigma) * x0) / sigma
            assert 0.8 < noise.std() < 1.2
            assert kwargs["timestep"].item() == pytest.approx(1000 * sigma)
            velocity = pipe.transformer(xt, **kwargs).sample.double()
            errors.append((velocity - (noise - x0)).square().mean().item())
    assert measured == pytest.approx(sum(errors) / 2, rel=1e-4)


def test_evaluation_of_the_truth_is_perfect_and_separates_seen_from_held_out():
    pipe, truth = load_base(), glyph_images([STYLE])[0] / 255
    quality = evaluate(pipe, truth[None], STYLE)
    assert quality.iou == quality.iou_seen == quality.right_letter == 1.0
    half = truth.clone()
    half[[LETTERS.index(letter) for letter in HELD_OUT_LETTERS]] = 0
    quality = evaluate(pipe, half[None], STYLE)
    assert (quality.iou, quality.iou_seen) == (0.0, 1.0)


def test_median_overlap_is_taken_over_letters_and_seeds(drawn):
    truth = glyph_images([STYLE])[0] / 255
    held_out = [LETTERS.index(letter) for letter in HELD_OUT_LETTERS]
    values = torch.cat([best_iou(row[held_out], truth[held_out]) for row in drawn])
    assert evaluate(load_base(), drawn, STYLE).iou == pytest.approx(values.median().item())
