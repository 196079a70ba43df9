"""torch.compile does not guard on hooks: graphs of a model whose hooks change must be dropped, and no others."""

from __future__ import annotations

import sys

import torch
from torch import nn


def forget_compiled(model: nn.Module) -> None:
    """Drop compiled graphs: torch.compile would go on with the forward of before."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    if eval_frame is not None and getattr(eval_frame, "cached_backends", None):
        torch.compiler.reset()
