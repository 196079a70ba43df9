"""What lies where while a recipe runs, and frozen weights that come where they compute: the numbers do not change."""

from __future__ import annotations

import importlib
import json
from contextlib import contextmanager

import pytest
import torch
from matplotlib import cbook
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from slora_diffusers import SerialLoraConfig, SerialLoraError, export_lora, load_serial_lora
from slora_diffusers.files.fingerprint import describe_base
from slora_diffusers.training import residence
from slora_diffusers.training.methods import ADAPTERS
from slora_diffusers.training.place import Place
from slora_diffusers.training.residence import Homes, blocks_of
from tests.tiny.flows import FLOWS
from tests.tiny.models import TINY
from tests.tiny.pipelines import tiny_sd3_pipeline

CPU = torch.device("cpu")
DEVICE = torch.device("cpu", 1)  # computes as the CPU does, and is told from it in what is moved there
FAMILIES = (
    "SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel", "DiTTransformer2DModel",
    "SanaTransformer2DModel", "QwenImageTransformer2DModel", "ZImageTransformer2DModel", "Lumina2Transformer2DModel",
    "WanTransformer3DModel",
)  # fmt: skip


def adapted(name, adapter="serial", checkpointing=False):
    model = TINY[name].build()
    torch.manual_seed(0)
    ADAPTERS[adapter].attach(model, SerialLoraConfig(rank=2))
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def loss_of(name, model, step=0):
    torch.manual_seed(step)  # of DiT's label dropout
    output = model(**TINY[name].arguments(step), return_dict=False)[0]
    output = torch.stack(list(output)) if isinstance(output, list) else output
    return output.float().square().mean()


def learn(name, model, steps=3):
    """Losses, and the adapter's weights after the steps."""
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for step in range(steps):
        loss = loss_of(name, model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {key: p.detach().clone() for key, p in trained.items()}


def assert_same(one, other):
    assert one[0] == other[0] and one[1].keys() == other[1].keys()
    for key, value in one[1].items():
        assert torch.equal(value, other[1][key]), key


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_that_come_from_the_cpu_train_to_the_same_bits(name, checkpointing):
    plain, offloaded = (adapted(name, checkpointing=checkpointing) for _ in range(2))
    before = {key: p.clone() for key, p in offloaded.named_parameters() if not p.requires_grad}
    homes = Homes(offloaded, DEVICE, blocks=True, narrow=False)
    in_blocks = {f"{path}.{key}" for path, module in offloaded.named_modules() for key, _ in module.named_parameters()
                 if any(module is block for block in blocks_of(offloaded))}  # fmt: skip
    assert set(homes.names) == {key for key in in_blocks if key in before}
    expected = learn(name, plain)
    assert len(set(expected[0])) == 3
    assert_same(learn(name, offloaded), expected)
    for key, weight in before.items():
        assert torch.equal(offloaded.get_parameter(key), weight), key
    assert describe_base(offloaded) == describe_base(plain)


def rounded(name, adapter="serial", checkpointing=False):
    """A model whose weights are rounded to 8 bits where diffusers' layerwise casting would hold them so."""
    model, chosen = (adapted(name, adapter, checkpointing) for _ in range(2))
    chosen.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    narrow = {key for key, p in chosen.named_parameters() if p.dtype == torch.float8_e4m3fn}
    for key in narrow:
        weight = model.get_parameter(key).data
        weight.copy_(weight.to(torch.float8_e4m3fn))
    return model, narrow


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_8_bits_train_as_weights_that_are_rounded_to_them(name, checkpointing, blocks):
    model, (reference, narrow) = adapted(name, checkpointing=checkpointing), rounded(name, checkpointing=checkpointing)
    Homes(model, DEVICE, blocks=blocks, narrow=True)
    assert narrow and {key for key, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn} == narrow
    assert_same(learn(name, model), learn(name, reference))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert {key for key, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn} == narrow


@pytest.mark.parametrize("blocks", [False, True])
def test_lora_of_peft_trains_the_same_on_such_weights(blocks):
    name = "SD3Transformer2DModel"
    model, (reference, _) = adapted(name, "lora", checkpointing=True), rounded(name, "lora")
    Homes(model, DEVICE, blocks=blocks, narrow=True)
    assert_same(learn(name, model), learn(name, reference))


def test_8_bits_compute_as_the_layerwise_casting_of_diffusers():
    name = "SD3Transformer2DModel"
    ours, theirs = (adapted(name, checkpointing=True) for _ in range(2))
    Homes(ours, DEVICE, blocks=True, narrow=True)
    theirs.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert_same(learn(name, ours), learn(name, theirs))


@contextmanager
def watched(monkeypatch):
    """Records what is fetched, and how many bytes of it lie on the device at a time."""
    fetch, alive, peaks = Homes._fetch, [], []

    def watch(self, parameter):
        copy = fetch(self, parameter)
        alive[:] = [(ref, size) for ref, size in alive if not ref.expired()]
        alive.append((StorageWeakRef(copy.untyped_storage()), copy.nbytes))
        peaks.append(sum(size for _, size in alive))
        return copy

    with monkeypatch.context() as patch:
        patch.setattr(Homes, "_fetch", watch)
        yield lambda: sum(size for ref, size in alive if not ref.expired()), peaks


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_more_than_a_block_is_on_the_device_at_a_time(name, checkpointing, monkeypatch):
    model = adapted(name, checkpointing=checkpointing)
    Homes(model, DEVICE, blocks=True, narrow=True)
    frozen = [[p for p in block.parameters() if not p.requires_grad] for block in blocks_of(model)]
    largest = max(sum(4 * p.numel() for p in own) for own in frozen)
    with watched(monkeypatch) as (held, peaks):
        loss = loss_of(name, model)
        assert held() == 0, "autograd keeps weights for the backward pass"
        assert 0 < max(peaks) <= largest
        peaks.clear()
        loss.backward()
        assert peaks and max(peaks) <= largest
        assert held() == 0


def test_a_forward_that_fails_leaves_the_weights_at_home(monkeypatch):
    name = "SD3Transformer2DModel"
    model = adapted(name)
    Homes(model, DEVICE, blocks=True, narrow=True)
    homes = {key: p.data_ptr() for key, p in model.named_parameters()}
    with monkeypatch.context() as patch:
        patch.setattr(type(model.transformer_blocks[-1].ff), "forward", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(name, model)
    assert {key: p.data_ptr() for key, p in model.named_parameters()} == homes
    plain = adapted(name)
    Homes(plain, DEVICE, blocks=False, narrow=True)
    assert_same(learn(name, model), learn(name, plain))


def test_weights_that_do_not_fit_go_home_and_the_run_may_go_on(monkeypatch):
    name = "SD3Transformer2DModel"
    model, plain = adapted(name), adapted(name)
    Homes(model, DEVICE, blocks=True, narrow=False)
    homes = {key: p.data_ptr() for key, p in model.named_parameters()}
    fetch, calls = Homes._fetch, []

    def full(self, parameter):
        calls.append(parameter)
        if len(calls) == 2:  # a bias: its layer's weight is there
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fetch(self, parameter)

    with monkeypatch.context() as patch:
        patch.setattr(Homes, "_fetch", full)
        with pytest.raises(torch.OutOfMemoryError):
            loss_of(name, model)
    assert calls[1].ndim == 1
    assert {key: p.data_ptr() for key, p in model.named_parameters()} == homes
    assert_same(learn(name, model), learn(name, plain))


# The recipes

QUICK = {
    "rank": 4, "train_batch_size": 2, "resolution": 32, "validation_steps": 2, "max_train_steps": 2, "seed": 3,
    "validation_inference_steps": 2, "num_validation_images": 1, "cache_latents": True, "checkpointing_steps": 0,
    "learning_rate": 1e-2,
}  # fmt: skip
TEXT = {"instance_prompt": "a photo of sks cat", "max_sequence_length": 16, "validation_loss_images": 1}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three crops of one photograph, in a folder of their class."""
    folder = tmp_path_factory.mktemp("photographs")
    photo = Image.open(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))).convert("RGB")
    (folder / "1").mkdir()
    for index, (x, y, side) in enumerate([(80, 20, 360), (100, 40, 300), (60, 60, 380)]):
        photo.crop((x, y, x + side, y + side)).resize((48, 48)).save(folder / "1" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory, dit_base, text_bases):
    folder = tmp_path_factory.mktemp("flows")
    FLOWS["sana"]().save_pretrained(folder / "sana")
    return {"dit": dit_base, "dreambooth_sd3": text_bases / "sd3", "dreambooth_sana": folder / "sana"}


def run(recipe, bases, photographs, out, **options):
    where = {"train_data_dir": photographs} if recipe == "dit" else {"instance_data_dir": photographs / "1", **TEXT}
    values = {"pretrained_model_name_or_path": bases[recipe], "output_dir": out, **QUICK, **where, **options}
    words = {name: () if value is True else (value,) for name, value in values.items() if value is not None}
    argv = [str(part) for name, value in words.items() for part in (f"--{name}", *value)]
    return importlib.import_module(f"slora_diffusers.recipes.{recipe}").main(argv)


def module_of(recipe):
    """Where a recipe's own steps are."""
    return importlib.import_module(f"slora_diffusers.recipes.{recipe.replace('dreambooth_sana', 'flow')}")


class Whereabouts:
    """Which models of a pipeline are on the device, whenever one of them computes."""

    def __init__(self, monkeypatch):
        self.events, self._there, self._names = [], set(), {}
        start, to = Place.__init__, nn.Module.to

        def with_device(place, options):
            start(place, options)
            place.device = DEVICE

        def moved(module, *args, **kwargs):
            device = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.device)), None)
            if device is not None:
                (self._there.add if device == DEVICE else self._there.discard)(self._names.get(module))
            return to(module, *args, **kwargs)

        monkeypatch.setattr(Place, "__init__", with_device)
        monkeypatch.setattr(nn.Module, "to", moved)

    def watch(self, pipe):
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                self._names[part] = name
                for call in ("forward", "encode", "decode"):
                    if hasattr(part, call) and not (name == "vae" and call == "forward"):
                        setattr(part, call, self._noting(name, getattr(part, call)))
        return pipe

    def _noting(self, name, call):
        def noting(*args, **kwargs):
            self.events.append((name, frozenset(self._there - {None})))
            return call(*args, **kwargs)

        return noting


@pytest.mark.parametrize("recipe", ["dreambooth_sd3", "dreambooth_sana", "dit"])
@pytest.mark.usefixtures("fresh_accelerator")
def test_encoders_and_vae_do_not_lie_beside_the_transformer(recipe, bases, photographs, tmp_path, monkeypatch):
    module = module_of(recipe)
    whereabouts, load = Whereabouts(monkeypatch), module.load_pipeline
    monkeypatch.setattr(module, "load_pipeline", lambda *args: whereabouts.watch(load(*args)))
    run(recipe, bases, photographs, tmp_path)
    kinds = {name for name, _ in whereabouts.events}
    encoders = {name for name in kinds if name.startswith("text_encoder")}
    assert kinds == {*encoders, "vae", "transformer"} and bool(encoders) == (recipe != "dit")
    phases = list(dict.fromkeys(whereabouts.events))
    for name, there in phases:
        assert name in there
        if name in encoders:
            assert there <= encoders
    # The VAE alone encodes; it comes for the pictures of step 0 and of step 2, and has gone when training goes on.
    names = [event for event in whereabouts.events if event[0] not in encoders]
    assert names[0] == ("vae", frozenset({"vae"}))
    trained = [there for name, there in names if name == "transformer"]
    assert frozenset({"transformer"}) in trained and frozenset({"transformer", "vae"}) in trained
    decoded = [index for index, event in enumerate(names) if event == ("vae", frozenset({"vae", "transformer"}))]
    assert len(decoded) == 2
    assert any(names[index] == ("transformer", frozenset({"transformer"})) for index in range(*decoded))


@pytest.mark.parametrize("recipe", ["dreambooth_sd3", "dreambooth_sana", "dit"])
@pytest.mark.usefixtures("fresh_accelerator")
def test_a_recipe_with_blocks_on_the_cpu_learns_the_same_bits(recipe, bases, photographs, tmp_path, monkeypatch):
    module = module_of(recipe)
    load = module.load_pipeline

    def aligned(*args):
        """Weights of a file lie where they lie in it, and matrix products round by where that is."""
        pipe = load(*args)
        for parameter in pipe.transformer.parameters():
            parameter.data = parameter.data.clone()
        return pipe

    monkeypatch.setattr(module, "load_pipeline", aligned)
    ways = {
        "plain": {},
        "offloaded": {"offload": "blocks"},
        "both": {"offload": "blocks", "gradient_checkpointing": True},
    }
    learnt = {name: load_file(run(recipe, bases, photographs, tmp_path / name, **way)) for name, way in ways.items()}
    for name in ("offloaded", "both"):
        for key, value in learnt["plain"].items():
            assert torch.equal(learnt[name][key], value), key
        pictures = (tmp_path / way / "validation" / "images-000002.png" for way in ("plain", name))
        assert len({picture.read_bytes() for picture in pictures}) == 1


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_in_8_bits_resumes_to_the_bit_and_its_result_fits_the_base(bases, photographs, tmp_path):
    options = {"quantize": "fp8", "offload": "blocks", "validation_steps": 0, "checkpointing_steps": 2}
    run("dreambooth_sd3", bases, photographs, tmp_path / "through", max_train_steps=4, **options)
    run("dreambooth_sd3", bases, photographs, tmp_path / "halves", max_train_steps=2, **options)
    more = {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    path = run("dreambooth_sd3", bases, photographs, tmp_path / "halves", **options, **more)
    through, halves = (load_file(tmp_path / name / path.name) for name in ("through", "halves"))
    assert through.keys() == halves.keys() and all(torch.equal(through[key], halves[key]) for key in through)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    pipe, stock = tiny_sd3_pipeline(), tiny_sd3_pipeline()
    load_serial_lora(pipe, path)
    export_lora(pipe, tmp_path / "lora")
    stock.load_lora_weights(tmp_path / "lora")
    arguments = {"encoder_hidden_states": torch.randn(1, 5, 32), "pooled_projections": torch.randn(1, 32)}
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([500.0])
    with torch.no_grad():
        live, exported = (p.transformer(x, timestep=t, **arguments).sample for p in (pipe, stock))
    torch.testing.assert_close(exported, live, rtol=1e-4, atol=1e-4)
    assert any(tensor.any() for key, tensor in load_file(path).items() if "lora_B" in key)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter": "full", "offload": "blocks"}, "--adapter full trains the weights themselves, and --offload"),
        ({"adapter": "full", "quantize": "fp8"}, "--quantize fp8 is for frozen ones"),
        ({"quantize": "nf4", "offload": "blocks"}, "--offload moves plain weights, and --quantize nf4"),
        ({"quantize": "int8", "offload": "blocks"}, "--offload moves plain weights, and --quantize int8"),
        ({"offload": "blocks", "compile": True}, "leave one out"),
        ({"quantize": "fp8", "compile": True}, "leave one out"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_loaded(options, said, bases, photographs, tmp_path):
    with pytest.raises(SerialLoraError, match=said) as error:
        run("dreambooth_sd3", bases, photographs, tmp_path / "out", **options)
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "out").exists()


def test_sharded_weights_are_refused(monkeypatch):
    class FSDP:
        device = CPU
        accelerator = type("Accelerator", (), {"distributed_type": residence.DistributedType.FSDP})

    class Options:
        offload, quantize = "blocks", None

    model = adapted("SD3Transformer2DModel")
    with pytest.raises(SerialLoraError, match=r"FSDP .*launch without"):
        residence.settle(model, Options(), FSDP())  # type: ignore[arg-type]
