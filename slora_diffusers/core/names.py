"""What places, pairs and matrices are called in models and in files: the one place that spells `.serial_lora.`.

transformer_blocks.0.attn  .serial_lora.  hidden_states  .lora_A.weight
path of the site                          pair           matrix
"""

from __future__ import annotations

MODULES = "modules_to_save"
"""What stands between a module that was saved whole and its tensors, in a file."""

CONTAINER = "serial_lora"
"""Attribute of a site under which its pairs are registered."""


def place_name(path: str, pair: str) -> str:
    """The name of a place for a pair: `<path of the site>.serial_lora.<pair>`."""
    return ".".join(part for part in (path, CONTAINER, pair) if part)


def split_place(place: str) -> tuple[str, str]:
    """(path of the site, pair) of a place; a site at the root of its model has the path ""."""
    path, _, pair = f".{place}".rpartition(f".{CONTAINER}.")
    return path[1:], pair


def matrix_name(place: str, matrix: str) -> str:
    """The key of matrix "A" or "B" of a place, in a file."""
    return f"{place}.lora_{matrix}.weight"


def split_matrix(key: str) -> tuple[str, str] | None:
    """(place, "A" or "B") of a key in a file, or None where it names no matrix of a pair."""
    for matrix in "AB":
        place = key.removesuffix(f".lora_{matrix}.weight")
        if place != key and is_of_pair(place):
            return place, matrix
    return None


def tensor_name(path: str, tensor: str) -> str:
    """The key of a tensor of a module that was saved whole, in a file: `<path>.modules_to_save.<tensor>`."""
    return f"{path}.{MODULES}.{tensor}"


def split_tensor(key: str) -> tuple[str, str] | None:
    """(path of the module, its tensor) of a key in a file, or None where it is of no such module."""
    path, found, tensor = key.partition(f".{MODULES}.")
    return (path, tensor) if found and path and tensor else None


def is_of_pair(name: str) -> bool:
    """Whether a parameter, module or key of a model belongs to a pair."""
    return f".{CONTAINER}." in f".{name}"
