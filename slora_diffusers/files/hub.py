"""Put a saved adapter on the Hub, with a model card whose code runs as it stands."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.names import split_place
from ..errors import AdapterFileError, SerialLoraError
from .format import AdapterFile, Component

PROMPT = "a photo of a cat"
IMAGES = ("*.png", "*.jpg", "*.jpeg", "*.webp")
_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CALLS = {"DiTTransformer2DModel": "class_labels=[0]"}
"""Arguments of the pipelines that take no prompt, by the class of their transformer."""

_PIPELINE = """\
from diffusers import DiffusionPipeline

import slora_diffusers  # gives every pipeline load_serial_lora

pipe = DiffusionPipeline.from_pretrained({base!r})
pipe.load_serial_lora({adapter!r})
{made} = pipe({call}).{made}s[0]
"""
_MODEL = """\
from transformers import {kind}

from slora_diffusers import load_serial_lora

model = {kind}.from_pretrained({base!r}).eval()
load_serial_lora(model, {adapter!r})
"""
_OTHER = """\
from slora_diffusers import load_serial_lora


def adapt(model):
    # `model` is the {kind} that the adapter was trained on
    load_serial_lora(model, {adapter!r})
    return model
"""
_CARD = """\
# {name}

A [Serial LoRA](https://arxiv.org/abs/2503.17750) adapter for {base}: `x~ = (I + s B A) x` in front of the \
attentions' projections, one pair of low-rank matrices per input.

{gallery}| | |
|---|---|
{rows}

## Use it

`pip install slora_diffusers`, then:

```python
{snippet}```

## Use it without slora_diffusers

On this base the adapter equals an ordinary LoRA. Write that with

```python
{export}```

and load the folder with {loader}; `format="kohya"` writes the names that ComfyUI reads, where they are known.
"""


def write_model_card(
    file: str | os.PathLike[str],
    repository: str | None = None,
    *,
    base_model: str | None = None,
    prompt: str = PROMPT,
    tags: Sequence[str] = (),
) -> Path:
    """Write `README.md` beside a saved adapter: what it is, pictures from its folder, and code that runs.

    Args:
        file: The adapter's file.
        repository: Hub id, or folder, that the code loads it from; `None` is the file's folder.
        base_model: Hub id or folder of the base pipeline or model; `None` takes the one in the file.
        prompt: Prompt of the example.
        tags: Tags besides serial-lora and lora.

    Returns:
        The card's path.

    Raises:
        AdapterFileError: If the file says nothing of its base and `base_model` is not given.
    """
    from huggingface_hub import ModelCard, ModelCardData

    file = Path(file)
    state = AdapterFile.read(file)
    components = state.components
    if not any(part.config for part in components.values()):
        raise AdapterFileError(f"{file} has no header, so there is nothing to write a card from. Save it again.")
    base = base_model or base_id(components)
    if base is None:
        raise AdapterFileError(f"{file} does not say what base it is for. Give it with base_model=...")
    adapter = repository or str(file.parent)
    pictures = sorted(path.name for kind in IMAGES for path in file.parent.glob(kind))
    bare = "model" in components
    data = ModelCardData(
        base_model=base if _ID.fullmatch(base) and not Path(base).exists() else None,
        library_name="transformers" if bare else "diffusers",
        tags=["serial-lora", "lora", *tags],
        widget=[{"text": prompt, "output": {"url": name}} for name in pictures] or None,
    )
    kind, code = _snippet(components, base, adapter, prompt)
    text = _CARD.format(
        name=Path(adapter).name,
        base=f"[{base}](https://huggingface.co/{base})" if data.base_model else f"`{base}`",
        gallery="<Gallery />\n\n" if pictures else "",
        rows="\n".join(f"| {name} | {value} |" for name, value in _facts(components, file).items()),
        snippet=code,
        export=_export(kind, components),
        loader="`pipe.load_lora_weights`" if _stock_loads(components) else "PEFT's `PeftModel.from_pretrained`",
    )
    path = file.parent / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(path)
    return path


def publish(
    file: str | os.PathLike[str],
    repository: str | bool,
    *,
    base_model: str | None = None,
    prompt: str = PROMPT,
    tags: Sequence[str] = (),
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a Serial LoRA adapter",
    also: Sequence[str] = (),
) -> str:
    """Upload a saved adapter, a model card and the pictures of its folder; returns the address of the commit.

    Args:
        file: The adapter's file. Of its folder, only the card, pictures and what `also` names go along.
        repository: Hub id; `True` takes the folder's name, in the user's own space.
        base_model: As for `write_model_card`, like `prompt` and `tags`.
        prompt: See there.
        tags: See there.
        private: Whether a new repository is private.
        token: Access token; by default the one that is logged in.
        revision: Branch.
        create_pr: Whether to open a pull request instead of committing.
        commit_message: Its message.
        also: Patterns of further files in the folder.

    Raises:
        SerialLoraError: If it cannot be uploaded; the file stays as it was saved.
    """
    from huggingface_hub import upload_folder

    file = Path(file)
    name = file.parent if repository is True else str(repository)
    try:
        repo_id = _repository(name, token, private)
        write_model_card(file, repo_id, base_model=base_model, prompt=prompt, tags=tags)
        commit = upload_folder(
            repo_id=repo_id,
            folder_path=file.parent,
            allow_patterns=[file.name, "README.md", *IMAGES, *also],
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
    except SerialLoraError as error:
        raise SerialLoraError(f"{file} is saved, but not uploaded: {error}") from error
    except Exception as error:  # it raises of many kinds, its HTTP library's too
        raise SerialLoraError(
            f"{file} is saved, but not uploaded to {_name_on_hub(name)} ({type(error).__name__}: {error}). Once the "
            "Hub can be reached and `hf auth login` is done, upload its folder: "
            f"hf upload {_name_on_hub(name)} {file.parent}"
        ) from error
    return str(commit.commit_url)


def _snippet(components: Mapping[str, Component], base: str, adapter: str, prompt: str) -> tuple[str, str]:
    """Whether the code makes a `pipe` or a `model`, and the code."""
    if "model" not in components:
        kind = _kind(components, "transformer") or ""
        made = "frame" if "3D" in kind else "image"
        call = _CALLS.get(kind, repr(prompt))
        return "pipe", _PIPELINE.format(base=base, adapter=adapter, call=call, made=made)
    import transformers

    kind = _kind(components, "model") or ""
    template = _MODEL if hasattr(transformers, kind) else _OTHER
    return "model", template.format(base=base, adapter=adapter, kind=kind)


def _export(kind: str, components: Mapping[str, Component]) -> str:
    if kind == "pipe":
        format = "" if _stock_loads(components) else ', format="peft"'
        return f'pipe.export_lora("lora"{format})\n'
    import transformers

    call = 'export_lora(model, "lora", format="peft")\n'
    known = hasattr(transformers, _kind(components, "model") or "")
    body = call if known else f"def export(model):\n    {call}"
    return "from slora_diffusers import export_lora\n\n" + ("" if known else "\n") + body


def _stock_loads(components: Mapping[str, Component]) -> bool:
    import diffusers

    kind = getattr(diffusers, _kind(components, "transformer") or "", None)
    return kind is not None and hasattr(kind, "load_lora_adapter")


def _facts(components: Mapping[str, Component], file: Path) -> dict[str, str]:
    facts = {}
    for name, part in components.items():
        pairs = part.pairs()
        kinds = dict.fromkeys(split_place(place)[1] for place in pairs)
        ranks = sorted({len(both["A"]) for both in pairs.values()})
        numel = sum(tensor.numel() for tensor in part.tensors.values())
        rank = "-".join(map(str, sorted({ranks[0], ranks[-1]})))
        alpha = "rank" if part.config is None or part.config.alpha is None else f"{part.config.alpha:g}"
        facts[name] = (
            f"rank {rank}, alpha {alpha}, {len(pairs)} pairs ({', '.join(sorted(kinds))}), {numel:,} parameters"
        )
    facts["file"] = f"`{file.name}`, {file.stat().st_size:,} bytes"
    return facts


def _kind(components: Mapping[str, Component], name: str) -> str | None:
    return components[name].base.kind if name in components else None


def base_id(components: Mapping[str, Component]) -> str | None:
    """The base's id or folder: of the pipeline, where a component's name says that it is part of one."""
    for component, part in components.items():
        name = part.base.name
        if not name:
            continue
        if cached := re.search(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots", name):
            return "/".join(cached.groups())
        path = Path(name)
        part = path.name == component and (not path.exists() or (path.parent / "model_index.json").is_file())
        return str(path.parent) if part else name
    return None


def reserve_repository(name: str | Path, token: str | None = None) -> str:
    """Create a repository, or find that it is there, before the work that it is for; returns its Hub id.

    Args:
        name: Hub id, or a folder, whose name it takes.
        token: Access token; by default the one that is logged in.

    Raises:
        SerialLoraError: If nobody is logged in, or the Hub cannot be reached.
    """
    try:
        return _repository(name, token)
    except Exception as error:  # it raises of many kinds, its HTTP library's too
        raise SerialLoraError(f"The Hub gives no repository {_name_on_hub(name)} to push to: {error}") from error


def _repository(name: str | Path, token: str | None, private: bool | None = None) -> str:
    from huggingface_hub import create_repo

    return create_repo(_name_on_hub(name), exist_ok=True, private=private, token=token).repo_id


def _name_on_hub(name: str | Path) -> str:
    return name.resolve().name if isinstance(name, Path) else name


def check_publishing(push_to_hub: bool | str, options: Mapping[str, Any]) -> None:
    """Raise SerialLoraError if options of an upload are given without one."""
    if options and not push_to_hub:
        raise SerialLoraError(f"{', '.join(options)} only mean something with push_to_hub.")
