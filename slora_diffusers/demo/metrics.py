"""What the demo measures: overlap with the true glyphs, and the denoising loss on fixed noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F

MAX_SHIFT = 3  # pixels: faces sit a little differently in the frame, and where a letter sits is not its style


def best_iou(images: torch.Tensor, truth: torch.Tensor, max_shift: int = MAX_SHIFT) -> torch.Tensor:
    """max over shifts |dx|, |dy| <= max_shift of |shifted image & truth| / |shifted image | truth|.

    Args:
        images: Grey images in [0, 1], (B, H, W); ink is what exceeds one half.
        truth: The glyphs they are compared to, (B, H, W).
        max_shift: Largest shift in pixels. What a shift pushes over the edge is lost, what comes in is empty.

    Returns:
        (B,) values in [0, 1]; 0 where both are empty.
    """
    ink, true_ink = (images > 0.5).float(), (truth > 0.5).float()
    height, width = ink.shape[-2:]
    padded = F.pad(ink, (max_shift,) * 4)
    best = torch.zeros(len(ink))
    for dy in range(2 * max_shift + 1):
        for dx in range(2 * max_shift + 1):
            shifted = padded[:, dy : dy + height, dx : dx + width]
            intersection = (shifted * true_ink).sum((1, 2))
            union = (shifted + true_ink).clamp(max=1).sum((1, 2))
            best = torch.maximum(best, intersection / union.clamp(min=1))
    return best


def nearest_glyph(images: torch.Tensor, glyphs: torch.Tensor) -> torch.Tensor:
    """Index of the glyph (G, H, W) that each image (B, H, W) overlaps best: (B,)."""
    scores = [best_iou(images, glyph.expand_as(images)) for glyph in glyphs]
    return torch.stack(scores).argmax(0)
