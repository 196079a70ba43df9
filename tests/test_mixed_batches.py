"""A batch whose samples have adapters of their own: each image is the one that its prompt gets alone.

The reference draws every image by itself, with one adapter set and the noise that the batch gave it.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline

import slora_diffusers as sl
from slora_diffusers.core.batch import rows_of, samples_of
from tests.adapters import add_random_adapter
from tests.tiny.models import TINY
from tests.tiny.pipelines import tiny_dit_pipeline, tiny_flux_pipeline, tiny_pixart_pipeline, tiny_sd3_pipeline

SIZE = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
PROMPTS = ["a photo of a cat", "a drawing of a dog"]
PIPELINES = {
    "sd3": (tiny_sd3_pipeline, {**SIZE, "max_sequence_length": 16}),
    "pixart": (tiny_pixart_pipeline, {**SIZE, "use_resolution_binning": False, "max_sequence_length": 16,
                                      "clean_caption": False}),
    "flux": (tiny_flux_pipeline, {**SIZE, "max_sequence_length": 16}),
}  # fmt: skip


def with_adapters(name, components=("transformer",)):
    pipe = PIPELINES[name][0]()
    pipe.set_progress_bar_config(disable=True)
    for component in components:
        for i, adapter in enumerate("ab"):
            add_random_adapter(getattr(pipe, component), adapter, seed=i + 1, std=0.5)
    pipe.set_serial_lora([])
    return pipe


def draw(pipe, name, prompts, images=1, seed=0, **call):
    torch.manual_seed(seed)  # a ControlNet's pipeline encodes its image with noise of its own
    generator = torch.Generator().manual_seed(seed)
    call = {**PIPELINES[name][1], "guidance_scale": 3.0, **call}
    return pipe(prompt=prompts, num_images_per_prompt=images, generator=generator, **call).images


def alone(pipe, name, entries, prompts, images, **call):
    """The batch once for each entry, set for all of it; every prompt's images are taken from its own entry's run."""
    parts = []
    for i, entry in enumerate(entries):
        (sample,) = samples_of([entry])
        pipe.set_serial_lora([n for n, _ in sample], [1.0 if w is None else w for _, w in sample])
        parts.append(draw(pipe, name, prompts, images, **call)[i * images : (i + 1) * images])
    pipe.set_serial_lora([])
    return torch.cat(parts)


@pytest.mark.parametrize("guidance", [0.0, 3.0], ids=["one-branch", "guided"])
@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("name", list(PIPELINES))
def test_names_belong_to_prompts(name, images, guidance):
    pipe = with_adapters(name)
    wanted = alone(pipe, name, ["a", "b"], PROMPTS, images, guidance_scale=guidance)
    with pipe.serial_lora_batch(["a", "b"]):
        got = draw(pipe, name, PROMPTS, images, guidance_scale=guidance)
    assert torch.allclose(got, wanted, atol=1e-4)
    with pipe.serial_lora_batch(["b", "a"]):
        assert not torch.allclose(draw(pipe, name, PROMPTS, images, guidance_scale=guidance), wanted, atol=1e-3)


@pytest.mark.parametrize("images", [1, 2])
def test_text_encoders_read_prompts_and_the_transformer_images(images):
    pipe = with_adapters("sd3", ("transformer", "text_encoder", "text_encoder_3"))
    wanted = alone(pipe, "sd3", ["a", "b"], PROMPTS, images)
    with pipe.serial_lora_batch(["a", "b"]):
        assert torch.allclose(draw(pipe, "sd3", PROMPTS, images), wanted, atol=1e-4)


def test_guidance_in_two_calls():
    """Flux calls its transformer once more for a true guidance scale."""
    pipe = with_adapters("flux")
    call = {"true_cfg_scale": 3.0, "negative_prompt": ["blurry", "dark"]}
    wanted = alone(pipe, "flux", ["a", "b"], PROMPTS, 2, **call)
    with pipe.serial_lora_batch(["a", "b"]):
        assert torch.allclose(draw(pipe, "flux", PROMPTS, 2, **call), wanted, atol=1e-4)


def test_a_callback_may_end_guidance_on_the_way():
    pipe = with_adapters("sd3")

    def end(pipe, step, timestep, values):
        if step > 0:
            return {}
        pipe._guidance_scale = 0.0
        return {name: tensor.chunk(2)[-1] for name, tensor in values.items()}

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    call = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": names, "num_inference_steps": 3}
    wanted = alone(pipe, "sd3", ["a", "b"], PROMPTS, 2, **call)
    with pipe.serial_lora_batch(["a", "b"]):
        assert torch.allclose(draw(pipe, "sd3", PROMPTS, 2, **call), wanted, atol=1e-4)


ENTRIES = ["a", None, ("a", 0.3), ("b", -0.5), {"a": 0.5, "b": 0.25}, ["a", "b"], [("a", 2.0), "b"], {}]


@pytest.mark.parametrize("one", ENTRIES, ids=str)
def test_samples_have_weights_and_several_adapters(one):
    pipe = with_adapters("sd3")
    entries = [one, "b"]
    wanted = alone(pipe, "sd3", entries, PROMPTS, 2)
    for given in (entries, iter(entries), tuple(entries), (entry for entry in entries)):
        with pipe.serial_lora_batch(given):
            assert torch.allclose(draw(pipe, "sd3", PROMPTS, 2), wanted, atol=1e-4)


def test_one_name_per_image_is_fine_too():
    pipe = with_adapters("sd3")
    every = {}
    for adapter in ("a", "b"):
        pipe.set_serial_lora(adapter)
        every[adapter] = draw(pipe, "sd3", PROMPTS[0], 4)
    with pipe.serial_lora_batch(["a", "b", "b", "a"]):
        got = draw(pipe, "sd3", PROMPTS[0], 4)
    for i, adapter in enumerate("abba"):
        assert torch.allclose(got[i], every[adapter][i], atol=1e-4)


@pytest.mark.parametrize(("names", "prompts", "images"), [("ab", 3, 1), ("aba", 2, 1), ("aba", 2, 2), ("abab", 3, 2)])
def test_names_that_fit_neither_prompts_nor_images_are_refused(names, prompts, images):
    pipe = with_adapters("sd3")
    with (
        pytest.raises(sl.SerialLoraError, match="one name per prompt, or one per image"),
        pipe.serial_lora_batch(list(names)),
    ):
        draw(pipe, "sd3", (PROMPTS * 2)[:prompts], images)


def test_a_controlnet_pipeline_draws_the_same_way():
    stock = with_adapters("sd3")
    net = SD3ControlNetModel.from_transformer(
        stock.transformer, num_layers=1, num_extra_conditioning_channels=0, load_weights_from_transformer=False
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    pipe = StableDiffusion3ControlNetPipeline(**stock.components, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    call = {"control_image": torch.rand(1, 3, 32, 32)}
    wanted = alone(pipe, "sd3", ["a", "b"], PROMPTS, 2, **call)
    with pipe.serial_lora_batch(["a", "b"]):
        assert torch.allclose(draw(pipe, "sd3", PROMPTS, 2, **call), wanted, atol=1e-4)


def test_a_pipeline_of_classes_has_one_name_per_class():
    pipe = tiny_dit_pipeline()
    pipe.set_progress_bar_config(disable=True)
    for i, adapter in enumerate("ab"):
        add_random_adapter(pipe.transformer, adapter, seed=i + 1, std=0.5)
    call = {"class_labels": [0, 1], "guidance_scale": 2.0, "num_inference_steps": 2, "output_type": "np"}

    def run():
        return torch.from_numpy(pipe(**call, generator=torch.Generator().manual_seed(0)).images)

    every = []
    for adapter in ("a", "b"):
        pipe.set_serial_lora(adapter)
        every.append(run())
    with pipe.serial_lora_batch(["a", "b"]):
        got = run()
    assert torch.allclose(got[0], every[0][0], atol=1e-3) and torch.allclose(got[1], every[1][1], atol=1e-3)


def test_a_bare_model_takes_the_number_of_images_where_it_is_told():
    tiny = TINY["SD3Transformer2DModel"]
    model = tiny.build()
    arguments = {key: torch.cat([tensor[:1]] * 4) for key, tensor in tiny.arguments().items()}
    for i, adapter in enumerate("ab"):
        add_random_adapter(model, adapter, seed=i + 1)
    every = {}
    with torch.no_grad():
        for adapter in "ab":
            sl.set_serial_lora(model, adapter)
            every[adapter] = model(**arguments).sample
        for images, order in ((None, "abab"), (1, "abab"), (2, "aabb")):
            with sl.serial_lora_batch(model, ["a", "b"], images_per_prompt=images):
                got = model(**arguments).sample
            for i, adapter in enumerate(order):
                assert torch.allclose(got[i], every[adapter][i], atol=1e-5)


@pytest.mark.parametrize(
    "bad",
    [[], "a", {"a": 1.0}, 3, [1], [("a", "b", 1.0)], [("a", float("nan"))], [{"a": "x"}], [["a", "a"]], [("a", True)],
     [{1: 1.0}], [["a", None]], [[]]],
    ids=str,
)  # fmt: skip
def test_what_is_no_list_of_adapters_is_refused(bad):
    pipe = with_adapters("sd3")
    with pytest.raises(sl.SerialLoraError):
        pipe.serial_lora_batch(bad)
    with pytest.raises(sl.SerialLoraError, match="Unknown adapter"):
        pipe.serial_lora_batch(["a", {"nobody": 1.0}])
    with pytest.raises(sl.SerialLoraError, match="images_per_prompt"):
        pipe.serial_lora_batch(["a"], images_per_prompt=0)


@pytest.mark.parametrize(("prompts", "images", "branches"), list(itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 3))))
def test_rows_are_branches_of_prompts_of_images(prompts, images, branches):
    rows = rows_of(prompts, prompts * images * branches, images, torch.nn.Identity())
    wanted = [prompt for _ in range(branches) for prompt in range(prompts) for _ in range(images)]
    assert list(rows) == wanted
