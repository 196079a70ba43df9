"""Images as people have them: damaged, huge, in folders of folders, in newer formats, with captions of every kind."""

import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image, features

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.training.data.captions import CaptionStyle
from slora_diffusers.training.data.folders import find_classes, find_images, from_dataset
from slora_diffusers.training.data.images import cut, read_image, to_pixels
from slora_diffusers.training.data.masks import mask_folder


def picture(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def write(path, seed=0, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, **more)
    return path


# --- damaged and huge ones ---


def damage(path, how):
    """Make a file that is not a complete image, in one of the ways that are seen."""
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 0xFF
    path.write_bytes({
        "empty": b"", "half": whole[: len(whole) // 2], "head": whole[:20], "text": b"<html>404</html>",
        "zeros": b"\0" * len(whole), "bit": bytes(flipped), "tail": whole[-len(whole) // 2 :],
    }[how])  # fmt: skip


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow, before it gives up
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "tif", "bmp"])
def test_damaged_images_are_left_out_and_named_in_every_format(ending, tmp_path, caplog):
    write(tmp_path / "whole.png")
    hows = ("empty", "half", "head", "text", "zeros", "tail")
    for how in hows:
        damage(write(tmp_path / f"{how}.{ending}", 1), how)
    damage(write(tmp_path / f"bit.{ending}", 1), "bit")  # may still be an image: then it is read, else left out
    found = find_images(tmp_path, prompt="x").report()
    kept = {item.name for item in found.items}
    assert "whole.png" in kept and kept | {name for name, _ in found.skipped} == {
        "whole.png", f"bit.{ending}", *(f"{how}.{ending}" for how in hows),
    }  # fmt: skip
    assert {f"{how}.{ending}" for how in ("empty", "head", "text", "zeros", "tail")} <= {n for n, _ in found.skipped}
    for item in found.items:
        assert item.read().size == item.size[::-1]
    assert all(name in caplog.text for name, _ in found.skipped)


def test_an_image_of_more_pixels_than_pillow_opens_is_left_out_and_named(tmp_path, monkeypatch):
    write(tmp_path / "small.png")
    picture(1, (100, 100)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    found = find_images(tmp_path, prompt="x")
    assert [item.name for item in found.items] == ["small.png"]
    assert found.skipped[0][0] == "huge.png" and "exceeds limit" in found.skipped[0][1]
    with pytest.raises(SerialLoraError, match=r"huge\.png cannot be read as an image"):
        read_image(tmp_path / "huge.png")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # datasets leaves what it cannot decode open
def test_a_damaged_row_of_a_data_set_is_left_out_and_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    paths = [str(write(tmp_path / f"{i}.png", i)) for i in range(3)]
    damage(tmp_path / "1.png", "half")
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    found = from_dataset(datasets.Dataset.from_dict({"image": paths, "text": list("abc")}, features=features))
    assert [item.caption for item in found.items] == ["a", "c"]
    assert found.skipped[0][0] == "row 1"


def test_a_strip_is_cut_in_little_memory_to_what_scaling_it_whole_would_give():
    """6000 x 20 pixels would be 307200 x 1024 before they are cut: a gigabyte."""
    strip = picture(0, (6000, 20))
    tracemalloc.start()
    pixels = to_pixels(strip, (512, 512))
    assert tracemalloc.get_traced_memory()[1] < 50e6  # numpy's and torch's; Pillow has no part of 900 MB either:
    tracemalloc.stop()
    assert pixels.shape == (3, 512, 512)
    photo = Image.open(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))).convert("RGB")
    for size, shape in [((300, 20), (64, 64)), ((20, 130), (40, 64)), ((50, 37), (32, 48)), ((64, 48), (16, 16))]:
        image = photo.resize(size)
        for seed in range(4):
            draw = torch.Generator().manual_seed(seed)
            ours = np.asarray(cut(image, shape, draw, crop=True), dtype=int)
            scale = max(shape[0] / image.height, shape[1] / image.width)
            covering = (max(shape[1], round(image.width * scale)), max(shape[0], round(image.height * scale)))
            again = torch.Generator().manual_seed(seed)
            top = int(torch.randint(covering[1] - shape[0] + 1, (1,), generator=again))
            left = int(torch.randint(covering[0] - shape[1] + 1, (1,), generator=again))
            whole = image.resize(covering, Image.Resampling.LANCZOS)
            theirs = np.asarray(whole.crop((left, top, left + shape[1], top + shape[0])), dtype=int)
            assert np.abs(ours - theirs).mean() < 0.5 and np.abs(ours - theirs).max() <= 16  # passes may change order


# --- formats ---


@pytest.mark.parametrize("ending", ["JPG", "jfif", "jpe", "avif", "tiff", "WEBP"])
def test_newer_and_rarer_endings_are_read(ending, tmp_path):
    if ending == "avif" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    kinds = {"avif": "AVIF", "tiff": "TIFF", "WEBP": "WEBP"}
    write(tmp_path / f"0.{ending}", format=kinds.get(ending, "JPEG"))
    (item,) = find_images(tmp_path, prompt="x").items
    assert item.read().size == (40, 30)


def test_heic_needs_a_plug_in_and_says_which(tmp_path, monkeypatch):
    write(tmp_path / "0.png")
    (tmp_path / "1.heic").write_bytes(b"\0\0\0\x18ftypheic")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_images(tmp_path, prompt="x").skipped == [
        ("1.heic", ".heic files need the package pillow-heif: pip install pillow-heif.")
    ]


def test_heic_is_read_with_its_plug_in(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(picture(0)).save(tmp_path / "0.heic")
    (item,) = find_images(tmp_path, prompt="x").items
    assert item.read().size == (40, 30)


# --- folders ---


def test_images_in_folders_inside_are_found_by_name_with_their_own_captions_and_metadata(tmp_path):
    for name in ("b.png", "a/0.png", "a/deep/0.png", "c/0.png", "c/1.png", ".hidden/0.png", "a/._0.png"):
        write(tmp_path / name)
    (tmp_path / "a" / "0.txt").write_text("a text")
    (tmp_path / "a" / "deep" / "0.caption").write_text("a caption")
    (tmp_path / "c" / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "a row", "weight": 0.5}))
    (tmp_path / "empty").mkdir()
    found = find_images(tmp_path, prompt="a prompt")
    assert {item.name: item.caption for item in found.items} == {
        "a/0.png": "a text", "a/deep/0.png": "a caption", "b.png": "a prompt", "c/0.png": "a row",
    }  # fmt: skip
    assert {item.name: item.weight for item in found.items if item.weight != 1} == {"c/0.png": 0.5}
    assert dict(found.skipped) == {"c/1.png": "not named in the metadata", "empty": "an empty folder"}


def test_what_a_run_keeps_inside_its_images_folder_is_not_trained_on(tmp_path):
    for name in ("0.png", "class/0.png", "out/validation/1.png", "mine/2.png"):
        write(tmp_path / name)
    found = find_images(tmp_path, prompt="x", without=[tmp_path / "class", tmp_path / "out", tmp_path / "absent"])
    assert [item.name for item in found.items] == ["0.png", "mine/2.png"]
    assert {name for name, _ in found.skipped} == {"class/", "out/"}


def test_a_link_that_leads_in_a_circle_ends(tmp_path):
    write(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert [item.name for item in find_images(tmp_path, prompt="x").items] == ["a/0.png"]


def test_class_folders_have_folders_of_their_own_and_weights(tmp_path):
    for name in ("cat/0.png", "cat/more/0.png", "dog/0.png"):
        write(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,weight\ncat/more/0.png,0.25\n")
    items = find_classes(tmp_path, ["cat", "dog"].index).items
    assert [(i.name, i.label, i.weight) for i in items] == [
        ("cat/0.png", 0, 1.0), ("cat/more/0.png", 0, 0.25), ("dog/0.png", 1, 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('{"file_name": "0.png", "text": "x", "weight": -1}', "weight of at least 0"),
        ('{"file_name": "0.png", "text": "x", "weight": "heavy"}', "line 1"),
        ('{"file_name": "0.png", "text": "x", "weight": true}', "line 1"),
        ('{"file_name": "0.png"}', "line 1"),
        ("[1]", "line 1"),
        ('"text"', "line 1"),
    ],
)
def test_metadata_that_are_wrong_name_their_line(table, message, tmp_path):
    write(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(table)
    with pytest.raises(SerialLoraError, match=message):
        find_images(tmp_path, prompt="x")


def test_two_tables_and_two_captions_that_differ_are_refused(tmp_path):
    write(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a cat")
    (tmp_path / "0.caption").write_text("a dog")
    with pytest.raises(SerialLoraError, match=r"two captions, in 0\.txt and 0\.caption"):
        find_images(tmp_path)
    assert find_images(tmp_path, style=CaptionStyle(caption_extension="caption")).items[0].caption == "a dog"
    (tmp_path / "0.caption").write_text("a cat\n")
    assert find_images(tmp_path).items[0].caption == "a cat"
    (tmp_path / "metadata.jsonl").write_text("")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a cat\n")
    with pytest.raises(SerialLoraError, match=r"both metadata\.jsonl and metadata\.csv, which differ"):
        find_images(tmp_path)


def test_a_mask_belongs_to_one_image_and_an_image_has_one_mask(tmp_path):
    for name in ("a/0.png", "b/0.png"):
        write(tmp_path / "images" / name)
        (tmp_path / "masks" / name).parent.mkdir(parents=True)
        Image.new("L", (40, 30), 1 if name[0] == "a" else 0).save(tmp_path / "masks" / name)
    items, masks = mask_folder(tmp_path, {"background": 0, "cat": 1})
    assert {item.name: int(masks[item.name]().max()) for item in items} == {"a/0.png": 1, "b/0.png": 0}
    Image.new("L", (40, 30)).save(tmp_path / "masks" / "a" / "0.gif")
    with pytest.raises(SerialLoraError, match=r"2 masks for a/0\.png"):
        mask_folder(tmp_path, {"background": 0, "cat": 1})


# --- captions ---


def test_a_trigger_stands_in_front_or_in_its_place_or_alone(tmp_path):
    style = CaptionStyle(trigger="sks")
    assert [style.forms([text])[0] for text in ("a cat", "a [trigger] cat", "")] == ["sks, a cat", "a sks cat", "sks"]
    write(tmp_path / "0.png")
    assert find_images(tmp_path, style=style).items[0].caption == "sks"


def test_tags_are_shuffled_and_dropped_but_for_those_that_are_kept():
    tags = [f"tag {i}" for i in range(8)]
    style = CaptionStyle(trigger="sks", shuffle_caption=True, keep_tokens=2, tag_dropout=0.3, caption_variants=200)
    caption, variants = style.forms([", ".join(tags)])
    assert caption == ", ".join(["sks", *tags]) and len(variants) == 200
    counts, orders = Counter(), set()
    for variant in variants:
        words = variant.split(", ")
        assert words[:2] == ["sks", "tag 0"] and len(set(words)) == len(words) and set(words) <= {"sks", *tags}
        counts.update(words[2:])
        orders.add(tuple(words))
    assert all(0.55 < counts[tag] / 200 < 0.85 for tag in tags[1:]) and len(orders) > 150
    assert style.forms([caption.removeprefix("sks, ")])[1] == variants  # the same at every start
    whole = CaptionStyle(shuffle_caption=True).forms(["a, b, c"])[1]
    assert all(sorted(variant.split(", ")) == ["a", "b", "c"] for variant in whole)


@pytest.mark.parametrize(
    ("how", "caption", "variants"),
    [("whole", "a cat\n\na dog", ()), ("first", "a cat", ()), ("each", "a cat", ("a cat", "a dog"))],
)
def test_a_text_of_several_lines_is_one_caption_its_first_line_or_a_caption_per_line(how, caption, variants):
    assert CaptionStyle(multiline_captions=how).forms(["a cat\n\na dog"]) == (caption, variants)


def test_each_sample_draws_one_form_evenly_and_the_same_when_asked_again(tmp_path):
    write(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("one\ntwo\nthree")
    (item,) = find_images(tmp_path, style=CaptionStyle(multiline_captions="each")).items
    drawn = [item.told(torch.Generator().manual_seed(seed)).caption for seed in range(300)]
    assert drawn == [item.told(torch.Generator().manual_seed(seed)).caption for seed in range(300)]
    assert all(70 < count < 130 for count in Counter(drawn).values()) and len(set(drawn)) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"tag_dropout": 1.0},
        {"tag_dropout": -0.1},
        {"keep_tokens": -1},
        {"caption_variants": 0},
        {"multiline_captions": "two"},
    ],
)
def test_captions_styles_that_cannot_be_are_refused(wrong):
    with pytest.raises(SerialLoraError, match=next(iter(wrong))):
        CaptionStyle(**wrong)


def test_a_data_sets_lists_of_captions_and_weights_are_used(tmp_path):
    datasets = pytest.importorskip("datasets")
    paths = [str(write(tmp_path / f"{i}.png", i)) for i in range(2)]
    features = datasets.Features(
        image=datasets.Image(), text=datasets.List(datasets.Value("string")), w=datasets.Value("float32")
    )
    rows = datasets.Dataset.from_dict({"image": paths, "text": [["a", "b"], ["c"]], "w": [0.5, 2]}, features=features)
    items = from_dataset(rows, weight_column="w").items
    assert [(i.caption, i.variants, i.weight) for i in items] == [("a", ("a", "b"), 0.5), ("c", (), 2.0)]
