"""Every public name, pipelines' verbs and heads' methods included, is described whole: arguments, types, errors."""

from __future__ import annotations

import inspect
import re

import pytest

import slora_diffusers as sl
from slora_diffusers.loader import VERBS, SerialLoraLoaderMixin

HEADS = [name for name in sl.__all__ if name.startswith("SerialLoraFor")]
# A head is made by one of its class methods; its constructor takes what those have made.
OF_HEADS = ("from_backbone", "from_clip", "from_sam", "from_pretrained", "save_pretrained", "forward", "predict")
OF_HEADS += ("fuse", "to_transformers")
CALLED = {
    **{name: getattr(sl, name) for name in sl.__all__ if name not in (*HEADS, "__version__")},
    **{f"{head}.{m}": f for head in HEADS for m in OF_HEADS if (f := getattr(getattr(sl, head), m, None)) is not None},
    **{f"pipe.{verb}": getattr(SerialLoraLoaderMixin, verb) for verb in VERBS},
}
NEVER_FAIL = {"serial_lora_status", "unload_serial_lora"}
"""Of models of any state."""
COMPUTE = (".predict", ".fuse", ".forward", ".to_transformers")
"""Of heads: what they raise is what the models below them do."""


def section(name: str, text: str) -> str:
    """The lines of one section of a docstring in Google's style."""
    called = CALLED[name]
    makers = [c for c in called.__mro__ if c.__module__.startswith("slora")] if inspect.isclass(called) else [called]
    whole = "\n".join(inspect.cleandoc(maker.__doc__ or "") for maker in makers) + "\n"
    return "".join(re.findall(rf"^{text}:\n((?:[ ]+.*\n|\n)*)", whole, re.MULTILINE))


def parameters(name: str) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(CALLED[name]).parameters.values() if p.name not in ("self", "cls")]


def test_there_is_all_that_the_pages_promise():
    assert len(CALLED) > 60
    assert {f"{head}.from_pretrained" for head in HEADS} <= set(CALLED)


@pytest.mark.parametrize("name", CALLED)
def test_every_argument_is_described_and_typed(name):
    described = re.findall(r"^\s*((?:\*{0,2}\w+(?:, )?)+):", section(name, "Args"), re.MULTILINE)
    known = {argument.strip("* ") for line in described for argument in line.split(",")}
    assert [p.name for p in parameters(name) if p.name not in known] == []
    assert [p.name for p in parameters(name) if p.annotation is p.empty] == []


@pytest.mark.parametrize("name", [name for name, called in CALLED.items() if not inspect.isclass(called)])
def test_what_is_returned_is_typed_and_what_is_raised_is_named(name):
    verb = name.removeprefix("pipe.")
    if not name.startswith("pipe."):  # the verbs of a pipeline return what the functions of their names do
        assert inspect.signature(CALLED[name]).return_annotation is not inspect.Signature.empty
    if verb not in NEVER_FAIL and not name.endswith(COMPUTE):
        assert "Error" in section(name, "Raises")
