"""Several data sets in one run, masks and weights: from the command line and a YAML file to the loss."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.recipes import dit, dreambooth_pixart, dreambooth_sd3
from slora_diffusers.training.data.batches import Batches
from slora_diffusers.training.data.cache import MomentReader, PixelReader, TensorCache
from slora_diffusers.training.data.images import Item, to_pixels
from slora_diffusers.training.data.loss_masks import grey, with_alpha, with_mask_files
from slora_diffusers.training.data.order import Rows
from slora_diffusers.training.diffusion.concepts import concepts_of
from slora_diffusers.training.diffusion.objectives import Objective
from slora_diffusers.training.diffusion.processes import Diffusion, RectifiedFlow
from slora_diffusers.training.diffusion.text_to_image import find_instances
from slora_diffusers.training.options import parse
from tests.tiny.pipelines import tiny_dit_pipeline, tiny_pixart_pipeline, tiny_sd3_pipeline, tiny_vae

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
QUICK = {
    "rank": 2, "resolution": 32, "validation_steps": 0, "checkpointing_steps": 0, "max_train_steps": 1,
    "num_validation_images": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    tiny_sd3_pipeline().save_pretrained(folder / "sd3")
    tiny_pixart_pipeline("sigma").save_pretrained(folder / "sigma")
    tiny_dit_pipeline("epsilon", learned_sigma=True).save_pretrained(folder / "dit")
    return folder


def pictures(folder, count, size=(40, 40), mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
        Image.fromarray(noise, "RGBA").convert(mode).save(folder / f"{index}.png")
    return folder


def argv(**options):
    return [part for n, v in options.items() for part in ((f"--{n}",) if v is True else (f"--{n}", str(v)))]


def run(recipe, base, out, **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe.main(argv(**{**QUICK, "pretrained_model_name_or_path": base, "output_dir": out, **options}))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def options_of(tmp_path, text, **more):
    (tmp_path / "data.yaml").write_text(text)
    flags = {"pretrained_model_name_or_path": "none", "dataset_config": tmp_path / "data.yaml", **more}
    return parse(dreambooth_sd3.Options, "", argv(**flags))


# --- data sets ---


def test_each_data_set_has_its_own_captions_repeats_weight_and_masks(tmp_path):
    pictures(tmp_path / "dog" / "more", 2)
    pictures(tmp_path / "style", 3)
    (tmp_path / "style" / "1.txt").write_text("red, green, blue")
    pictures(tmp_path / "masked", 1, mode="RGBA")
    options = options_of(tmp_path, f"""
- folder: {tmp_path}/dog
  caption: a photo of sks dog
  repeats: 5
  weight: 0.5
- folder: {tmp_path}/style
  trigger: drawn by sks
  shuffle_caption: true
  resolution: 64
- folder: {tmp_path}/masked
  caption: 1e-4
  alpha_mask: true
  unmasked_weight: 0.25
""", tag_dropout=0.5, resolution=32)  # fmt: skip
    items, unseen = find_instances(options)
    assert [(i.name, i.caption, i.repeats, i.weight, i.concept) for i in items] == [
        ("more/0.png", "a photo of sks dog", 5, 0.5, 0),
        ("more/1.png", "a photo of sks dog", 5, 0.5, 0),
        ("0.png", "drawn by sks", 1, 1.0, 1),
        ("1.png", "drawn by sks, red, green, blue", 1, 1.0, 1),
        ("2.png", "drawn by sks", 1, 1.0, 1),
        ("0.png", "1e-4", 1, 1.0, 2),
    ]
    assert unseen == items and [item.mask is not None for item in items] == [False] * 5 + [True]
    assert items[-1].floor == 0.25
    assert all(variant.startswith("drawn by sks") for variant in items[3].variants) and len(set(items[3].variants)) > 1
    assert [concept.resolution for concept in concepts_of(options)] == [32, 64, 32]
    assert [concept.tag_dropout for concept in concepts_of(options)] == [0.5] * 3  # flags are what entries begin with


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a list"),
        ("folder: dog", "must hold a list"),
        ("- dog", "each entry must be"),
        ("- folder: dog\n  folders: cat", "data set 1: unknown option 'folders'; did you mean folder"),
        ("- folder: dog\n- caption: x", "data set 2 must name one of folder and dataset_name"),
        ("- folder: dog\n  dataset_name: x", "data set 1 must name one of"),
        ("- folder: dog\n  repeats: 0", "repeats must be at least 1"),
        ("- folder: dog\n  repeats: two", "repeats cannot be 'two'"),
        ("- folder: dog\n  weight: -1", "loss_weight must be at least 0"),
        ("- folder: dog\n  tag_dropout: 1", "tag_dropout must lie in"),
        ("- folder: dog\n  multiline_captions: both", "must be one of whole, first, each"),
        ("- folder: dog\n  folder: cat", "given twice"),
        ("- folder: dog\n  instance_data_dir: cat", "given twice"),
        ("- folder: dog\n  rank: 4", "unknown option 'rank'"),
        ("- folder: dog\n  dataset_config: x.yaml", "unknown option"),
        ("- folder: [dog, cat]", "cannot be a list"),
        ("- {folder: dog", "is not YAML"),
        ("- folder: dog\n  class_prompt: a dog", "needs --class_data_dir and --class_prompt"),
    ],
)
def test_a_file_of_data_sets_that_is_wrong_says_where(text, message, tmp_path, monkeypatch):
    pictures(tmp_path / "dog", 1)
    (tmp_path / "dog" / "0.txt").write_text("a dog")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SerialLoraError, match=message):
        find_instances(options_of(tmp_path, text))


def test_data_sets_come_from_one_place(tmp_path):
    with pytest.raises(SerialLoraError, match="give one of --instance_data_dir and --dataset_name"):
        find_instances(options_of(tmp_path, "- folder: dog", instance_data_dir="cat"))


def test_a_run_over_several_data_sets_sees_each_as_it_says(bases, tmp_path, monkeypatch):
    """Two subjects, one twice as often, in their own resolutions and with class images of their own."""
    for name, count in (("dog", 2), ("cat", 3)):
        pictures(tmp_path / name, count)
    (tmp_path / "data.yaml").write_text(f"""
- folder: {tmp_path}/dog
  caption: a photo of sks dog
  repeats: 2
  class_data_dir: {tmp_path}/dogs
  class_prompt: a photo of a dog
  num_class_images: 2
- folder: {tmp_path}/cat
  trigger: a photo of sks cat
  resolution: 16
""")
    seen = []
    read = Batches.__getitem__
    monkeypatch.setattr(Batches, "__getitem__", lambda self, n: seen.append(read(self, n)) or seen[-1])
    options = {"dataset_config": tmp_path / "data.yaml", "train_batch_size": 2, "num_train_epochs": 2}
    options |= {"max_sequence_length": 16, "class_inference_steps": 1, "cache_latents": True, "max_train_steps": 8}
    run(dreambooth_sd3, bases / "sd3", tmp_path / "out", **options)
    counts = Counter((item.caption, batch.shape) for batch in seen for item in batch.items)
    assert counts == {
        ("a photo of sks dog", (32, 32)): 8, ("a photo of a dog", (32, 32)): 8, ("a photo of sks cat", (16, 16)): 6,
    }  # fmt: skip
    assert len(list((tmp_path / "dogs").glob("*.png"))) == 2


def test_shuffled_captions_are_encoded_before_the_encoders_go(bases, tmp_path, monkeypatch):
    folder = pictures(tmp_path / "images", 2)
    for index in range(2):
        (folder / f"{index}.caption").write_text("sks cat, red, green, blue\na second line")
    told = []
    captions_of = dreambooth_pixart.captions_of
    monkeypatch.setattr(
        dreambooth_pixart,
        "captions_of",
        lambda batch, empty: told.extend(captions_of(batch, empty)) or captions_of(batch, empty),
    )
    options = {"multiline_captions": "first", "shuffle_caption": True, "keep_tokens": 1, "max_train_steps": 6}
    run(
        dreambooth_pixart,
        bases / "sigma",
        tmp_path / "out",
        instance_data_dir=folder,
        **options,
        max_sequence_length=16,
    )
    assert len(set(told)) > 2 and all(text.startswith("sks cat, ") and "second" not in text for text in told)


# --- masks ---


def masked_item(seed=0, size=(40, 30)):
    """An image that is its own mask: what is cut of one must be cut of the other."""
    pixels = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0]), dtype=np.uint8))
    return Item("0.png", pixels.convert("RGB").copy, size[::-1], mask=pixels.copy)


@pytest.mark.parametrize(("crop", "flip"), [(False, False), (True, False), (False, True), (True, True)])
def test_masks_are_cut_and_flipped_as_their_images_are(crop, flip):
    item = masked_item()
    batches = Batches([item], Rows.of([item], [(16, 16)], 1, seed=0), PixelReader(crop, flip))
    views = set()
    for number in range(8):
        batch = batches[number]
        torch.testing.assert_close(batch.masks[0] * 2 - 1, batch.inputs[0, :1], atol=1e-5, rtol=0)
        views.add(batch.masks.numpy().tobytes())
    assert len(views) == 1 if not (crop or flip) else len(views) > 1


def test_cached_masks_are_flipped_as_their_latents_are_and_follow_the_masks_content(tmp_path):
    vae, cache = tiny_vae(), TensorCache(tmp_path)
    reader, item = MomentReader(cache, vae, flip=True), masked_item()
    reader.fill([item], [[(16, 16)]], vae)
    upright = (to_pixels(item.read(), (16, 16))[:1] + 1) / 2
    for seed in range(6):
        flipped = bool(torch.rand(1, generator=torch.Generator().manual_seed(seed)) < 0.5)
        mask = reader.mask(item, (16, 16), torch.Generator().manual_seed(seed))
        torch.testing.assert_close(mask, upright.flip(-1) if flipped else upright, atol=1e-3, rtol=0)
    others = [masked_item(1), replace(item, floor=0.5), replace(item, mask=None)]
    read = [reader.mask(one, (16, 16), torch.Generator().manual_seed(0)) for one in (item, *others)]
    assert all(not a.equal(b) for n, a in enumerate(read) for b in read[:n])


@pytest.mark.parametrize("process", [
    RectifiedFlow(lambda u: u), Diffusion(torch.linspace(0.99, 0.01, 10), sigma="ignore"),
    Diffusion(torch.linspace(0.99, 0.01, 10), sigma="hybrid"),
])  # fmt: skip
def test_the_masked_loss_is_the_weighted_mean_and_blind_to_what_the_mask_leaves_out(process):
    x0, noise, output = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.randn(2, 8, 4, 4)
    learned = getattr(process, "sigma", "") == "hybrid"
    output = output if learned else output[:, :4]
    times = torch.tensor([0.3, 0.7]) if isinstance(process, RectifiedFlow) else torch.tensor([3, 7])
    item = Item("0", lambda: None, (8, 8))
    masks = torch.zeros(2, 1, 8, 8)
    masks[:, :, :4], masks[1, :, 4:6] = 1.0, 0.5
    small = torch.nn.functional.adaptive_avg_pool2d(masks, 4)
    batch = type("B", (), {"noise": lambda self, x: noise, "masks": masks, "items": [item]})()
    objective = Objective(process)
    noised = objective.draw(x0, batch, times)
    torch.testing.assert_close(noised.mask, small)
    losses = objective.compare(output, noised)
    if not learned:
        error = (output.double() - process.target(x0, noise, times).double()) ** 2
        expected = (error * small).sum((1, 2, 3)) / (4 * small.sum((1, 2, 3)))
        torch.testing.assert_close(losses, expected.float())
    hidden = (small == 0).expand_as(output)
    assert objective.compare(torch.where(hidden, output + 3, output), noised).equal(losses)
    assert not objective.compare(output + 3, noised).equal(losses)
    whole = objective.compare(output, replace(noised, mask=torch.ones_like(small)))
    torch.testing.assert_close(whole, objective.compare(output, replace(noised, mask=None)))
    nothing = objective.compare(output, replace(noised, mask=torch.zeros_like(small)))
    assert nothing.abs().max() == 0


def test_masks_are_read_from_files_of_any_mode_and_from_alpha(tmp_path):
    values = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    Image.fromarray(values).save(tmp_path / "l.png")
    Image.fromarray(values.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(np.stack([values] * 3, -1)).save(tmp_path / "rgb.png")
    for name in ("l", "deep", "rgb"):
        assert np.abs(np.array(grey(tmp_path / f"{name}.png"), dtype=int) - values).max() <= 1, name
    Image.fromarray(np.dstack([np.full((6, 8, 3), 9, np.uint8), values])).save(tmp_path / "rgba.png")
    items = [Item(f"{name}.png", lambda: None, (6, 8)) for name in ("rgba", "rgb")]
    with_channel, without = with_alpha(items, tmp_path, 0.0)
    assert with_channel.mask is not None and without.mask is None
    assert (np.array(with_channel.mask()) == values).all()


def test_masks_that_are_missing_of_another_size_or_black_are_refused(tmp_path):
    folder = pictures(tmp_path / "masks", 0)
    item = Item("0.jpg", lambda: None, (30, 40))
    with pytest.raises(SerialLoraError, match=r"no mask for 0\.jpg"):
        with_mask_files([item], folder, 0.0)
    Image.new("L", (30, 40), 255).save(folder / "0.png")
    with pytest.raises(SerialLoraError, match=r"has \(40, 30\) pixels"):
        with_mask_files([item], folder, 0.0)
    Image.new("L", (40, 30)).save(folder / "0.png")
    with pytest.raises(SerialLoraError, match="black throughout"):
        with_mask_files([item], folder, 0.0)
    assert with_mask_files([item], folder, 0.5)[0].floor == 0.5
    with pytest.raises(SerialLoraError, match="is not a folder"):
        with_mask_files([item], tmp_path / "none", 0.0)


@pytest.mark.parametrize(("recipe", "base"), [(dreambooth_sd3, "sd3"), (dreambooth_pixart, "sigma"), (dit, "dit")])
def test_a_white_mask_changes_no_loss_a_half_one_does_and_weights_scale_it(recipe, base, bases, tmp_path):
    images = pictures(tmp_path / "images" / ("0" if recipe is dit else ""), 2)
    data = {"train_data_dir": tmp_path / "images"} if recipe is dit else {
        "instance_data_dir": images, "instance_prompt": "a cat", "max_sequence_length": 16,
    }  # fmt: skip
    inner = "0" if recipe is dit else ""
    for name, value in (("white", 255), ("half", 0)):
        (tmp_path / name / inner).mkdir(parents=True)
        for index in range(2):
            mask = Image.new("L", (40, 40), 255)
            mask.paste(value, (0, 0, 40, 20))
            mask.save(tmp_path / name / inner / f"{index}.png")
    losses = {}
    for name in (None, "white", "half"):
        own = {} if name is None else {"mask_data_dir": tmp_path / name}
        losses[name] = run(recipe, bases / base, tmp_path / f"out-{name}", **data, **own)[0]
    assert losses["white"] == pytest.approx(losses[None], rel=1e-5)
    assert abs(losses["half"] - losses[None]) > 1e-4 * losses[None]
    cached = run(
        recipe, bases / base, tmp_path / "cached", **data, mask_data_dir=tmp_path / "half", cache_latents=True
    )[0]
    assert cached == pytest.approx(losses["half"], rel=1e-3)
    if recipe is not dit:
        weighed = run(recipe, bases / base, tmp_path / "weighed", **data, loss_weight=0.5)[0]
        assert weighed == pytest.approx(0.5 * losses[None], rel=1e-5)
