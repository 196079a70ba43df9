"""The data sets of a run: one from the flags, or several from a YAML file, each with its own captions and settings."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from ...errors import SerialLoraError
from ..config_file import read_list
from ..data.captions import MULTILINE, CaptionStyle
from ..data.folders import find_images, from_dataset
from ..data.images import Item
from ..data.labelled import open_dataset
from ..data.loss_masks import masked
from ..options import COUNT, NOT_NEGATIVE, MaskOptions
from ..parsing import option, specs_of, values_of

SHORT = {"folder": "instance_data_dir", "caption": "instance_prompt", "weight": "loss_weight"}  # in the YAML file
NOT_EACH = ("dataset_config",)


@dataclass(frozen=True)
class ConceptOptions(MaskOptions):
    """Images and captions."""

    dataset_config: str | None = option(None, "YAML list of data sets, each with its own of the following options.")
    instance_data_dir: str | None = option(None, "Folder of the images (and captions) to train on.")
    instance_prompt: str | None = option(None, "Caption of images that have none of their own.")
    dataset_name: str | None = option(None, "Data set to train on instead: Hub id, or folder of save_to_disk.")
    dataset_config_name: str | None = option(None, "Config of that data set.")
    image_column: str = option("image", "Its column of images.")
    caption_column: str = option("text", "Its column of captions.")
    weight_column: str | None = option(None, "Its column of weights, if it has one.")
    repeats: int = option(1, "How often an epoch shows each image.", within=COUNT)
    loss_weight: float = option(1.0, "Weight of the images' loss.", within=NOT_NEGATIVE)
    trigger: str | None = option(None, "Word put in front of every caption, or in the place of [trigger] in it.")
    shuffle_caption: bool = option(False, "Shuffle the tags of captions, which commas part.")
    keep_tokens: int = option(0, "Tags in front that are neither shuffled nor dropped.", within=NOT_NEGATIVE)
    tag_dropout: float = option(0.0, "Share of the other tags that are left out.", within="[0, 1)")
    caption_variants: int = option(8, "Forms of each caption with shuffled or dropped tags.", within=COUNT)
    multiline_captions: str = option("whole", "What of a caption of several lines is used.", choices=MULTILINE)
    caption_extension: str | None = option(None, "Ending of the files of captions; .txt or .caption by default.")
    class_data_dir: str | None = option(None, "Folder of the class images; missing ones are drawn with the base.")
    class_prompt: str | None = option(None, "Caption of the class images.")
    num_class_images: int = option(100, "How many class images there are to be.", within=COUNT)


T = TypeVar("T", bound=ConceptOptions)


def concepts_of(options: T) -> list[T]:
    """The options of each data set: those of the flags, with what its entry in the YAML file says instead.

    An entry may have every option of `ConceptOptions`, and --resolution.

    Raises:
        SerialLoraError: If there is no such file, or an entry is not such options or names no images.
    """
    sources = (options.instance_data_dir, options.dataset_name, options.dataset_config)
    if sum(source is not None for source in sources) != 1:
        raise SerialLoraError(
            "give one of --instance_data_dir and --dataset_name, or several data sets by --dataset_config."
        )
    if options.dataset_config is None:
        return [options]
    path, concepts = Path(options.dataset_config), []
    known = {field.name for field in fields(ConceptOptions)} - set(NOT_EACH) | {"resolution"}
    specs = {name: spec for name, spec in specs_of(options).items() if name in known}
    for number, entry in enumerate(read_list(path, "--dataset_config"), start=1):
        where = f"--dataset_config {path}: data set {number}"
        given = values_of(entry, specs, where, SHORT)
        if (given.get("instance_data_dir") is None) == (given.get("dataset_name") is None):
            raise SerialLoraError(f"{where} must name one of folder and dataset_name.")
        concepts.append(replace(options, dataset_config=None, **given))
    return concepts


def find_concept(options: ConceptOptions, number: int, seed: int, without: list[Path]) -> list[Item]:
    """The images of one data set, with all that its options say of them.

    Args:
        options: Those of the data set.
        number: Which of the run's data sets it is.
        seed: Where shuffles of captions come from.
        without: Folders that hold something else.
    """
    names = [field.name for field in fields(CaptionStyle) if field.name != "seed"]
    style = CaptionStyle(**{name: getattr(options, name) for name in names}, seed=seed)
    if options.instance_data_dir is not None:
        inside = [Path(folder) for folder in (options.class_data_dir, options.mask_data_dir) if folder is not None]
        elsewhere = [*without, *inside]
        items = find_images(options.instance_data_dir, options.instance_prompt, style, elsewhere).report().items
        items = masked(items, options.instance_data_dir, options)
    else:
        if options.mask_data_dir is not None or options.alpha_mask:
            raise SerialLoraError("--mask_data_dir and --alpha_mask go with --instance_data_dir.")
        assert options.dataset_name is not None
        dataset = open_dataset(options.dataset_name, "train", config=options.dataset_config_name)
        columns = (options.image_column, options.caption_column, options.instance_prompt)
        items = from_dataset(dataset, *columns, style, options.weight_column).report().items
    more = {"repeats": options.repeats, "concept": number}
    return [replace(item, weight=item.weight * options.loss_weight, **more) for item in items]
