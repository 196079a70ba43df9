"""Images at their own shape: padded as SAM does, cropped as transformers does, and predictions at the image's size."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor
from transformers import BitImageProcessor, SamImageProcessor, SamProcessor

from slora_diffusers import SerialLoraError
from slora_diffusers.files.format import AdapterFile
from slora_diffusers.heads.framing import RESIZE_MODES, frame_of
from slora_diffusers.heads.preprocessing import Preprocessing
from slora_diffusers.heads.promptable import SerialLoraForPromptableSegmentation
from slora_diffusers.heads.segmentation import SerialLoraForSemanticSegmentation
from slora_diffusers.training.data.images import Item
from slora_diffusers.training.data.labelled import Fetch
from tests.test_vision import CONFIG, PREPARE, classifier, pixels, segmenter, shaken
from tests.test_vision_promptable import MODELS
from tests.tiny.vision import SIZE, VISION

SHAPES = [(21, 50), (50, 21), (16, 16), (3, 90), (64, 63), (7, 5), (1, 40)]  # height, width
PADDED = replace(PREPARE, resize_mode="pad")


def photo(height: int, width: int) -> Image.Image:
    draw = np.random.default_rng(height * 1000 + width)
    small = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def padded(make: Any, **arguments: Any) -> Any:
    model = shaken(make(**arguments))
    model.preprocessing = PADDED
    return model


def sam_processor(size: int) -> Any:
    edges = {"height": size, "width": size}
    images = SamImageProcessor(
        size={"longest_edge": size}, pad_size=edges, mask_size={"longest_edge": size // 4}, mask_pad_size=edges
    )
    return SamProcessor(images)


@pytest.mark.parametrize("shape", SHAPES)
def test_padded_pixels_points_and_boxes_are_sams(shape: tuple[int, int]):
    processor, image = sam_processor(64), photo(*shape)
    points, box = [[[1.0, 2.0], [shape[1] - 1.0, shape[0] - 1.0]]], [0.0, 0.5, shape[1] - 1.0, float(shape[0])]
    theirs = processor(image, input_points=[points], input_boxes=[[box]], return_tensors="pt")
    prepare = Preprocessing((64, 64), resize_mode="pad")
    frame = prepare.frame(shape)
    torch.testing.assert_close(prepare(image), theirs["pixel_values"][0].float(), rtol=1e-4, atol=1e-4)
    assert frame.shape == tuple(theirs["reshaped_input_sizes"][0].tolist())
    torch.testing.assert_close(
        frame.points(torch.tensor(points)), theirs["input_points"][0].float(), rtol=1e-5, atol=1e-5
    )
    corners = frame.points(torch.tensor(box).view(2, 2)).flatten()
    torch.testing.assert_close(corners, theirs["input_boxes"][0, 0].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_come_back_as_sams_post_processing_gives_them(shape: tuple[int, int]):
    processor, frame = sam_processor(64), frame_of(shape, (64, 64), "pad")
    low = torch.randn(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    sizes = (torch.tensor([shape]), torch.tensor([frame.shape]))
    (theirs,) = processor.post_process_masks(low, *sizes, binarize=False)
    torch.testing.assert_close(torch.stack([frame.restore(maps) for maps in low[0]]), theirs, rtol=1e-5, atol=1e-5)


def test_a_sam_predicts_what_its_processor_and_model_give():
    sam, image = MODELS["sam"][0].build(), photo(21, 50)
    model = SerialLoraForPromptableSegmentation.from_sam(sam, None).eval()
    assert model.preprocessing.resize_mode == "pad"  # as the original
    boxes, points = torch.tensor([[3.0, 2.0, 40.0, 20.0]]), torch.tensor([[[10.0, 12.0], [30.0, 3.0]]])
    labels = torch.tensor([[1, 0]])
    processor = sam_processor(model.preprocessing.size[0])
    prompts = {"input_boxes": [boxes.tolist()], "input_points": [points.tolist()], "input_labels": [labels.tolist()]}
    theirs = processor(image, **prompts, return_tensors="pt")
    sizes = (theirs.pop("original_sizes"), theirs.pop("reshaped_input_sizes"))
    theirs = {key: value.float() if value.is_floating_point() else value for key, value in theirs.items()}
    with torch.no_grad():
        low = sam(**theirs, multimask_output=False).pred_masks
    (expected,) = processor.post_process_masks(low, *sizes, binarize=False)
    got = model.predict(image, points, labels, boxes)
    torch.testing.assert_close(got, expected[:, 0], rtol=1e-3, atol=1e-4)


def test_sam_2_stretches_as_its_processor_does():
    model = SerialLoraForPromptableSegmentation.from_sam(MODELS["sam2"][0].build(), None).eval()
    assert model.preprocessing.resize_mode == "stretch"
    assert model.predict(photo(21, 50), input_boxes=torch.tensor([[0.0, 0.0, 20.0, 20.0]])).shape == (1, 21, 50)


def test_the_loss_of_a_sam_leaves_padding_out():
    model = SerialLoraForPromptableSegmentation.from_sam(MODELS["sam"][0].build(), None).eval()
    frame = model.preprocessing.frame((8, 16))
    inputs = {"pixel_values": model.preprocessing(photo(8, 16))[None], "input_boxes": torch.tensor([[[0.0, 0, 8, 8]]])}
    masks = torch.zeros(1, 1, 16, 16)
    masks[..., :4, :8] = 1
    mask = frame.pixel_mask()[None]
    loss = model(masks=masks, pixel_mask=mask, **inputs).loss
    masks[..., 8:, :] = 1  # on padding
    torch.testing.assert_close(model(masks=masks, pixel_mask=mask, **inputs).loss, loss)
    logits = F.interpolate(model(**inputs).pred_masks[:, :, 0], (16, 16), mode="bilinear")[..., :8, :]
    p, m = logits.sigmoid(), masks[..., :8, :]
    dice = (2 * (p * m).sum() + 1) / (p.sum() + m.sum() + 1)
    torch.testing.assert_close(loss, F.binary_cross_entropy(p, m) + 1 - dice)
    with pytest.raises(SerialLoraError, match="lay them out"):
        model(masks=torch.zeros(1, 1, 8, 16), **inputs)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_crops_are_the_centre_that_transformers_takes(shape: tuple[int, int]):
    edges = {"height": 16, "width": 16}
    processor: Any = BitImageProcessor(size={"shortest_edge": 16}, crop_size=edges, resample=2, image_mean=[0.5] * 3)
    processor.image_std = [0.5] * 3
    prepare = Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3, "crop")
    theirs = processor(photo(*shape), return_tensors="pt")["pixel_values"][0]
    assert (prepare(photo(*shape)) - theirs).abs().max() < 0.12  # half a pixel's shift, where the rest is odd
    assert (prepare(photo(*shape)) - theirs).abs().mean() < 0.03


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_image_mask_and_labels_lie_over_each_other(mode: str, shape: tuple[int, int]):
    """A white object on black: where the input is white, its label is 1; where it is padding, 255."""
    prepare = Preprocessing((24, 32), (0.25,) * 3, (1.0,) * 3, mode)
    if mode == "tile" and (shape[0] > 24 or shape[1] > 32):
        with pytest.raises(SerialLoraError, match=r"model\.predict"):
            prepare.frame(shape)
        return
    truth = np.zeros(shape, np.uint8)
    truth[: max(1, shape[0] // 2), shape[1] // 3 :] = 1
    frame, values = prepare.frame(shape), prepare(Image.fromarray(255 * truth))
    labels, mask = frame.labels(Image.fromarray(truth)), frame.pixel_mask()
    assert values.shape == (3, 24, 32) and labels.shape == mask.shape == (24, 32)
    assert torch.equal(labels == 255, mask == 0) and bool((values[:, mask == 0] == 0).all())
    assert mask.sum() == frame.shape[0] * frame.shape[1]
    near = (values[0] + 0.25 - labels.where(mask == 1, 0)).abs()[mask == 1]
    assert (near < 0.51).float().mean() > 0.95  # but for the seam, which bilinear blurs


@pytest.mark.parametrize("mode", ["stretch", "pad"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_segmentation_has_the_images_size_and_only_what_was_seen_of_it(mode: str, shape: tuple[int, int]):
    model = shaken(segmenter())
    model.preprocessing = replace(PREPARE, resize_mode=mode)
    logits = model(model.preprocessing(photo(*shape))[None]).logits
    height, width = model.preprocessing.frame(shape).shape
    expected = F.interpolate(logits[..., :height, :width], shape, mode="bilinear")[0]
    got = model.predict(photo(*shape))
    assert got.shape == (3, *shape) and not got.requires_grad
    torch.testing.assert_close(got, expected)


def test_padding_is_left_out_of_the_mean_over_patches():
    model, image = padded(classifier, pooling="mean"), photo(8, 16)  # fills the upper half
    values = PADDED(image)[None]
    hidden = model.backbone(values).last_hidden_state[:, 1:9]  # the first two rows of four patches
    torch.testing.assert_close(model.predict(image), model.head(hidden.mean(1))[0].detach())
    assert not torch.allclose(model(values).logits[0], model.predict(image), atol=1e-3)


def test_a_patch_weighs_what_part_of_it_is_image():
    model = padded(classifier, pooling="both")
    mask = torch.zeros(2, SIZE, SIZE)
    mask[:, :6, :] = 1  # one row of patches and half of the next
    hidden = model.backbone(pixels()).last_hidden_state
    weights = torch.tensor([1.0] * 4 + [0.5] * 4)[None, :, None]
    mean = (hidden[:, 1:9] * weights).sum(1) / weights.sum()
    expected = model.head(torch.cat([hidden[:, 0], mean], 1))
    torch.testing.assert_close(model(pixels(), pixel_mask=mask).logits, expected)
    with pytest.raises(SerialLoraError, match="pixel_mask must be"):
        model(pixels(), pixel_mask=mask[:1])


def test_padding_counts_for_nothing_in_the_loss_of_pixels():
    model = padded(segmenter)
    frame = PADDED.frame((8, 16))
    labels = torch.randint(3, (2, SIZE, SIZE), generator=torch.Generator().manual_seed(1))
    expected = F.cross_entropy(model(pixels()).logits[:, :, :8], labels[:, :8])
    mask = frame.pixel_mask().expand(2, -1, -1)
    torch.testing.assert_close(model(pixels(), labels=labels, pixel_mask=mask).loss, expected)
    labels[:, 8:] = 255
    torch.testing.assert_close(model(pixels(), labels=labels).loss, expected)
    with pytest.raises(SerialLoraError, match="lay them out in the same way"):
        model(pixels(), labels=labels[:, :8])  # of the bare images: they would shift


def test_a_file_remembers_and_one_of_before_stretches(tmp_path):
    model = padded(segmenter)
    path = model.save_pretrained(tmp_path)
    back = SerialLoraForSemanticSegmentation.from_pretrained(tmp_path, VISION["Dinov2Model"].build())
    assert back.preprocessing == PADDED
    torch.testing.assert_close(back.predict(photo(21, 50)), model.predict(photo(21, 50)))
    file = AdapterFile.read(path)
    assert file.head is not None
    before = {key: file.head.preprocessing[key] for key in ("size", "mean", "std")}
    assert Preprocessing.from_dict(before) == PREPARE


@pytest.mark.parametrize(
    "wrong", [{"resize_mode": "squeeze"}, {"resize_mode": ["pad"]}, {"overlap": -1}, {"overlap": "4"}, {"overlap": 16}]
)
def test_modes_and_overlaps_that_are_none_are_refused(wrong: dict[str, Any]):
    with pytest.raises(SerialLoraError, match=r"resize_mode must be one of|must share"):
        Preprocessing.from_dict({**PREPARE.to_dict(), **wrong})


def test_what_was_not_seen_is_not_segmented():
    cropped = replace(PREPARE, resize_mode="crop")
    with pytest.raises(SerialLoraError, match="cannot be segmented"):
        SerialLoraForSemanticSegmentation.from_backbone(VISION["Dinov2Model"].build(), 3, CONFIG, preprocessing=cropped)
    with pytest.raises(SerialLoraError, match="was not seen"):
        cropped.frame((21, 50)).restore(torch.zeros(3, SIZE, SIZE))
    with pytest.raises(SerialLoraError, match="its image"):
        PADDED.frame((21, 50)).labels(Image.new("L", (21, 50)))


@pytest.mark.parametrize("mode", ["stretch", "pad", "crop", "tile"])
def test_training_reads_image_and_mask_alike(mode: str):
    """The image is its own mask, in grey: after any draw they agree, and padding is 255."""
    truth = np.zeros((40, 30), np.uint8)
    truth[10:30, 5:20] = 1
    item = Item("a", lambda: Image.fromarray(255 * truth).convert("RGB"), (40, 30))
    prepare = Preprocessing((16, 16), (0.0,) * 3, (1.0,) * 3, mode)
    fetch = Fetch(prepare, 0.5, True, {} if mode == "crop" else {"a": lambda: truth})
    for seed in range(20):
        read = fetch(item, (16, 16), torch.Generator().manual_seed(seed))
        if mode == "crop":
            assert read.shape == (3, 16, 16)
            continue
        counted = read[3] != 255
        assert (read[0] - read[3])[counted].abs().gt(0.6).float().mean() < 0.03
        assert bool((read[:3, ~counted] == 0).all()) and (mode == "pad" or bool(counted.all()))
    bare = Fetch(prepare, 1.0)(item, (16, 16), torch.Generator())
    assert bare.shape[0] == (4 if prepare.pads else 3)
    if mode == "pad":
        assert torch.equal(bare[3], prepare.frame((40, 30)).pixel_mask())


def test_what_a_models_own_preprocessing_says_is_kept(tmp_path):
    sam_processor(64).image_processor.save_pretrained(tmp_path)
    MODELS["sam"][0].build().save_pretrained(tmp_path)
    assert Preprocessing.of(tmp_path) == Preprocessing((64, 64), resize_mode="pad")
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**values, "do_pad": False}))
    assert Preprocessing.of(tmp_path).resize_mode == "stretch"
    assert Preprocessing.of(VISION["SamVisionModel"].build()).resize_mode == "pad"


@pytest.mark.parametrize("mode", ["stretch", "pad", "crop"])
def test_transformers_pipeline_prepares_images_in_the_same_way(mode: str, tmp_path):
    model = shaken(classifier("ViTModel"))
    model.preprocessing = replace(PREPARE, resize_mode=mode)
    model.to_transformers(tmp_path)
    classify: Any = transformers.pipeline("image-classification", str(tmp_path))
    for shape in ((16, 32), (32, 16), (64, 16)):
        found = {entry["label"]: entry["score"] for entry in classify(photo(*shape), top_k=4)}
        expected = model.predict(photo(*shape)).softmax(0)
        assert [found[name] for name in model.label_names] == pytest.approx(expected.tolist(), abs=2e-2)


@pytest.mark.parametrize(
    ("change", "match"),
    [({"resize_mode": "tile"}, "image processors"), ({"resize_mode": "crop", "size": (16, 8)}, "does not read")],
)
def test_what_transformers_cannot_prepare_is_refused_before_anything_is_written(change, match, tmp_path):
    model = shaken(classifier("ViTModel"))
    model.preprocessing = replace(PREPARE, **change)
    with pytest.raises(SerialLoraError, match=match):
        model.to_transformers(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mean_without_padding_is_no_class_of_transformers():
    with pytest.raises(SerialLoraError, match="leaves padding out"):
        padded(classifier, pooling="both").to_transformers()


@pytest.mark.parametrize("make", [lambda: padded(classifier, pooling="both"), lambda: padded(segmenter)])
@pytest.mark.parametrize("state", ["live", "fused"])
def test_exported_programs_take_the_mask(make: Any, state: str):
    model = make().requires_grad_(False)
    model = model.fuse() if state == "fused" else model
    frame = PADDED.frame((21, 50))
    inputs = {"pixel_values": PADDED(photo(21, 50))[None], "pixel_mask": frame.pixel_mask()[None]}
    exported = torch.export.export(model, (), inputs)
    got: Tensor = exported.module()(**inputs).logits[0]
    expected = model.predict(photo(21, 50))
    torch.testing.assert_close(frame.restore(got) if model.of_pixels else got, expected, rtol=1e-4, atol=1e-4)
