"""Finding, reading, ordering and caching training images."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.training.data.batches import Batches
from slora_diffusers.training.data.cache import (
    Latents,
    PixelReader,
    TensorCache,
    cache_texts,
    encode_moments,
    sample_latents,
)
from slora_diffusers.training.data.folders import find_classes, find_images, from_dataset
from slora_diffusers.training.data.identity import key_of, model_key
from slora_diffusers.training.data.images import read_image, to_pixels
from slora_diffusers.training.data.order import Rows, bucket_shapes
from tests.tiny.pipelines import tiny_vae

CAPTIONS = ["a red cat", "a green cat", "a blue cat"]


def picture(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def folder_of(path, **files):
    path.mkdir(parents=True, exist_ok=True)
    for index in range(3):
        picture(index).save(path / f"{index}.png")
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def contents(items):
    return [(item.caption, item.size, item.read().tobytes()) for item in items]


def test_prompt_captions_metadata_and_dataset_give_identical_items(tmp_path):
    texts = {f"{i}__txt": caption for i, caption in enumerate(CAPTIONS)}
    lines = "\n".join(json.dumps({"file_name": f"{i}.png", "text": c}) for i, c in enumerate(CAPTIONS))
    by_text = find_images(folder_of(tmp_path / "a", **texts))
    by_table = find_images(folder_of(tmp_path / "b", metadata__jsonl=lines))
    datasets = pytest.importorskip("datasets")
    rows = {"image": [str(tmp_path / "a" / f"{i}.png") for i in range(3)], "text": CAPTIONS}
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    by_rows = from_dataset(datasets.Dataset.from_dict(rows, features=features))
    assert contents(by_text.items) == contents(by_table.items) == contents(by_rows.items)
    assert [item.caption for item in by_text.items] == CAPTIONS
    assert not by_text.skipped and not by_table.skipped
    prompted = find_images(folder_of(tmp_path / "c"), prompt="a cat").items
    assert [c[1:] for c in contents(prompted)] == [c[1:] for c in contents(by_text.items)]
    assert {item.caption for item in prompted} == {"a cat"}


def test_stray_and_corrupt_files_are_left_out_and_reported(tmp_path, caplog):
    folder = folder_of(tmp_path, notes__md="x", stray__txt="no image has this name")
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a jpeg")
    whole = folder / "half.png"
    picture(9, (200, 200)).save(whole)
    whole.write_bytes(whole.read_bytes()[:20000])
    (folder / "inner").mkdir()
    found = find_images(folder, prompt="a cat").report()
    assert [item.name for item in found.items] == ["0.png", "1.png", "2.png"]
    assert sorted(name for name, _ in found.skipped) == ["cut.jpg", "half.png", "inner", "notes.md", "stray.txt"]
    assert all(name in caplog.text for name, _ in found.skipped)


def test_images_are_read_upright_in_rgb_whatever_their_mode(tmp_path):
    base = picture(0, (8, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    base.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(np.array(base), k=-1))
    transparent = np.dstack([np.array(base), np.full((6, 8), 0, np.uint8)])
    transparent[0, 0, 3] = 255
    Image.fromarray(transparent).save(tmp_path / "alpha.png")
    seen = np.array(read_image(tmp_path / "alpha.png"))
    assert (seen[0, 0] == np.array(base)[0, 0]).all() and (seen[1:] == 255).all()
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert (np.array(read_image(tmp_path / "grey.png")) == grey[..., None]).all()
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert (np.array(read_image(tmp_path / "deep.png")) == grey[..., None]).all()
    base.quantize(16).save(tmp_path / "palette.png")
    assert np.array_equal(read_image(tmp_path / "palette.png"), np.array(base.quantize(16).convert("RGB")))
    base.quantize(16).save(tmp_path / "hole.gif", transparency=int(np.array(base.quantize(16))[2, 3]))
    assert (np.array(read_image(tmp_path / "hole.gif"))[2, 3] == 255).all()


@pytest.mark.parametrize(
    ("files", "prompt", "message"),
    [
        ({"metadata__jsonl": '{"file_name": "9.png", "text": "x"}'}, None, "9.png"),
        ({"metadata__jsonl": '{"file": "0.png"}'}, None, "line 1"),
        ({"0__txt": "a cat"}, None, "1.png has no caption"),
        ({"metadata__jsonl": '{"file_name": "0.png", "text": 5}'}, None, "line 1"),
        ({"metadata__jsonl": '{"file_name": 5, "text": "x"}'}, None, "line 1"),
    ],
)
def test_captions_that_are_wrong_or_missing_are_named(tmp_path, files, prompt, message):
    with pytest.raises(SerialLoraError, match=message):
        find_images(folder_of(tmp_path, **files), prompt=prompt)


def test_captions_are_read_from_files_as_windows_writes_them(tmp_path):
    lines = "\n".join(json.dumps({"file_name": f"./{i}.png", "text": c}) for i, c in enumerate(CAPTIONS))
    folder = folder_of(tmp_path)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8-sig")
    found = find_images(folder)
    assert [item.caption for item in found.items] == CAPTIONS
    assert not found.skipped
    (folder / "metadata.jsonl").unlink()
    (folder / "0.txt").write_text("a café", encoding="utf-8-sig")
    assert find_images(folder, prompt="x").items[0].caption == "a café"
    (folder / "0.txt").write_bytes("a café".encode("latin-1"))
    with pytest.raises(SerialLoraError, match=r"0\.txt is not UTF-8"):
        find_images(folder, prompt="x")


def test_folders_that_are_missing_empty_or_wrongly_named_are_refused(tmp_path):
    with pytest.raises(SerialLoraError, match="is not a folder"):
        find_images(tmp_path / "none", prompt="x")
    with pytest.raises(SerialLoraError, match="no usable image"):
        find_images(tmp_path, prompt="x")
    folder_of(tmp_path / "classes" / "cat")
    with pytest.raises(SerialLoraError, match="no class is called cat"):
        find_classes(tmp_path / "classes", lambda name: None)
    with pytest.raises(SerialLoraError, match="it holds no folder"):
        find_classes(tmp_path / "classes" / "cat", lambda name: 0)


def test_class_folders_give_their_class_ids(tmp_path):
    for name in ("dog", "7"):
        folder_of(tmp_path / name)
    items = find_classes(tmp_path, lambda name: int(name) if name.isdigit() else 3).items
    assert [(item.name, item.label) for item in items][::3] == [("7/0.png", 7), ("dog/0.png", 3)]
    assert len(items) == 6


def test_pixels_are_the_image_cut_from_the_centre(tmp_path):
    image = picture(0, (40, 30))
    whole = to_pixels(image, (30, 40))
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(to_pixels(image, (30, 20)), expected[:, :, 10:30])


def test_cuts_and_flips_are_fresh_at_each_epoch_and_the_same_at_each_repetition(tmp_path):
    items = find_images(folder_of(tmp_path), prompt="x").items
    rows = Rows.of(items, [(16, 16)], 1, seed=0)
    batches = Batches(items, rows, PixelReader(crop=True, flip=True))
    seen = {}
    for number in range(12):
        batch = batches[number]
        seen.setdefault(batch.items[0].name, []).append(batch.inputs)
        torch.testing.assert_close(batches[number].inputs, batch.inputs, rtol=0, atol=0)
    for views in seen.values():
        assert len(views) == 4
        assert len({view.numpy().tobytes() for view in views}) >= 3


def test_every_epoch_shows_every_item_once_and_processes_share_a_row(tmp_path):
    rows = Rows([(8, 8)] * 12, 4, seed=1)
    epochs = [[index for number in range(e * 3, e * 3 + 3) for index in rows[number]] for e in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    items = find_images(folder_of(tmp_path), prompt="x").items
    order = Rows.of(items, [(16, 16)], 2, seed=1)
    one = Batches(items, order, PixelReader())[5]
    two = [Batches(items, order, PixelReader(), rank, 2)[5] for rank in range(2)]
    kept = [item for part in two for item, weight in zip(part.items, part.weights, strict=True) if weight]
    assert kept == one.items
    noise = [batch.noise(torch.empty(len(batch.items), 4, 2, 2))[batch.weights > 0] for batch in (one, *two)]
    torch.testing.assert_close(torch.cat(noise[1:]), noise[0], rtol=0, atol=0)


def test_buckets_never_mix_shapes_and_keep_every_item():
    shapes = [(16, 16)] * 5 + [(8, 32)] * 3 + [(32, 8)]
    rows = Rows(shapes, 2, seed=0)
    assert rows.per_epoch == 3 + 2 + 1
    epoch = [rows[number] for number in range(rows.per_epoch)]
    assert all(len({shapes[index] for index in row}) == 1 for row in epoch)
    assert {index for row in epoch for index in row} == set(range(9))


@pytest.mark.filterwarnings("ignore:Bucket dimension")  # diffusers reads the shapes, then we refuse them
def test_bucket_shapes_fit_the_models_patches():
    assert bucket_shapes(64, None, 16) == [(64, 64)]
    assert bucket_shapes(64, "32,64;64,32", 16) == [(32, 64), (64, 32)]
    auto = bucket_shapes(512, "auto", 16)
    assert (512, 512) in auto and len(auto) > 5
    assert all(h % 16 == 0 and w % 16 == 0 and 0.85 < h * w / 512**2 < 1.15 for h, w in auto)
    for resolution, buckets in ((60, None), (64, "30,64")):
        with pytest.raises(SerialLoraError, match="multiple of 16"):
            bucket_shapes(resolution, buckets, 16)
    with pytest.raises(SerialLoraError, match="height,width"):
        bucket_shapes(64, "32x64", 16)


def test_class_images_join_every_batch_in_the_shape_of_the_subject(tmp_path):
    items = find_images(folder_of(tmp_path / "a"), prompt="sks cat").items
    prior = find_images(folder_of(tmp_path / "b"), prompt="cat").items
    batch = Batches(items, Rows.of(items, [(16, 24)], 2, seed=0), PixelReader(), prior=prior)[0]
    assert batch.prior.tolist() == [False, False, True, True]
    assert [item.caption for item in batch.items] == ["sks cat"] * 2 + ["cat"] * 2
    assert batch.inputs.shape == (4, 3, 16, 24)
    assert len(set(batch.samples)) == 4


def test_batches_can_be_read_ahead_by_other_processes(tmp_path):
    items = find_images(folder_of(tmp_path), prompt="x").items
    batches = Batches(items, Rows.of(items, [(16, 16)], 2, seed=0), PixelReader(crop=True))
    assert pickle.loads(pickle.dumps(batches))[3].inputs.equal(batches[3].inputs)
    reader = batches.read(7)
    assert [next(reader).number for _ in range(3)] == [7, 8, 9]


def test_cached_latents_equal_fresh_ones_and_follow_content_shape_and_vae(tmp_path):
    items = find_images(folder_of(tmp_path / "images"), prompt="x").items
    vae, cache = tiny_vae(), TensorCache(tmp_path / "cache")
    rows = Rows.of(items, [(16, 16)], 3, seed=0)
    fresh = Latents(vae, None, False, False, torch.device("cpu"))
    cached = Latents(vae, cache, False, False, torch.device("cpu"))
    cached.fill(items, [[(16, 16)]] * 3)
    expected = fresh(Batches(items, rows, fresh.fetch)[0])
    torch.testing.assert_close(cached(Batches(items, rows, cached.fetch)[0]), expected, rtol=1e-5, atol=1e-5)

    def entries(items, shape, vae):
        before = len(list(cache.folder.iterdir()))
        Latents(vae, cache, False, False, torch.device("cpu")).fill(items, [[shape]] * len(items))
        return len(list(cache.folder.iterdir())) - before

    assert entries(items, (16, 16), vae) == 0
    assert entries(items, (16, 24), vae) == 3
    assert entries(items, (16, 16), tiny_vae(seed=5)) == 3
    picture(77).save(tmp_path / "images" / "0.png")
    assert entries(find_images(tmp_path / "images", prompt="x").items, (16, 16), vae) == 1


def test_latents_are_the_vaes_shifted_and_scaled():
    vae = tiny_vae(shift_factor=0.5, scaling_factor=2.0)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        distribution = vae.encode(pixels).latent_dist
    noise = torch.randn(distribution.mean.shape[1:], generator=torch.Generator().manual_seed(3))[None]
    expected = (distribution.mean + distribution.std * noise - 0.5) * 2.0
    draws = [torch.Generator().manual_seed(3)]
    torch.testing.assert_close(sample_latents(encode_moments(vae, pixels), vae.config, draws), expected)


def test_an_edited_caption_or_another_encoder_is_encoded_anew(tmp_path):
    cache, calls = TensorCache(tmp_path), []

    def encode(text):
        calls.append(text)
        return {"embedding": torch.full((2,), float(len(text)))}

    keys = cache_texts(cache, ["a cat", "a dog"], encode, "encoder 1")
    assert cache[keys["a cat"]]["embedding"].tolist() == [5.0, 5.0]
    cache_texts(cache, ["a cat", "a big dog"], encode, "encoder 1")
    cache_texts(TensorCache(tmp_path), ["a cat"], encode, "encoder 2")
    assert calls == ["a cat", "a dog", "a big dog", "a cat"]


def test_a_models_key_follows_its_config_and_weights():
    one, same, other = tiny_vae(), tiny_vae(), tiny_vae(scaling_factor=0.3)
    assert model_key(one) == model_key(same) != model_key(other)
    next(same.parameters()).data += 1e-3
    assert model_key(one) != model_key(same)
    assert key_of("a", "b") != key_of("ab") and key_of(torch.zeros(2)) != key_of(torch.zeros(3))
