"""Fine-tunes the demo's base on the letters it may see, and measures it on the letters it may not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline
from diffusers.utils import logging
from torch import nn

from ..training.diffusion.processes import Process, process_for
from ..training.randomness import generator
from .glyphs import HELD_OUT_LETTERS, LETTERS, SEEN_LETTERS, Face, Jitter, glyph_images, to_pixels
from .metrics import best_iou, nearest_glyph
from .quiet import quiet

BASE = Path(__file__).parent / "base"
NULL_CLASS = 1000  # the id that DiTPipeline hard-codes for "no class"
GUIDANCE = 2.5  # DiTPipeline's default, 4, thickens the strokes
INFERENCE_STEPS = 20


@dataclass(frozen=True)
class Setting:
    """How one method is fine-tuned. Every method sees the same images, noise and times in the same order."""

    learning_rate: float
    steps: int = 150
    batch_size: int = 26
    variations: int = 32  # copies of each letter, a little moved: to stretch or thicken them would change the style
    label_dropout: float = 0.0  # the model of no class stays the base's, so that guidance strengthens the style, too
    seed: int = 0


@dataclass(frozen=True)
class Quality:
    """What a model makes of the letters that no method was trained on."""

    denoising_loss: float  # mean over letters, fixed noise and times
    iou: float  # best IoU over small shifts, median over letters and seeds
    iou_seen: float  # the same on the letters of the training set
    right_letter: float  # share of samples whose nearest glyph of the new style is the letter asked for


def load_base() -> DiTPipeline:
    """The built-in base model, in fp32, as a stock pipeline."""
    with quiet(logging):  # a stock model_index.json keeps class ids as text, which it warns of
        pipe = DiTPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval()  # so that the label embeddings drop nothing of their own
    return pipe


@torch.no_grad()
def encode(pipe: DiTPipeline, images: torch.Tensor) -> torch.Tensor:
    """Scaled latents (N, C, h, w) of uint8 glyphs (N, H, W)."""
    latents = [pipe.vae.encode(to_pixels(batch)).latent_dist.mode() for batch in images.split(128)]
    return torch.cat(latents) * pipe.vae.config.scaling_factor


Data = tuple[torch.Tensor, torch.Tensor]  # latents (N, C, h, w) and class ids (N,)


def training_data(pipe: DiTPipeline, style: Face, setting: Setting) -> Data:
    """The seen letters of `style`."""
    return _examples(pipe, style, SEEN_LETTERS, setting.variations, setting.seed)


def finetune(pipe: DiTPipeline, parameters: Iterable[nn.Parameter], style: Face, setting: Setting) -> Iterator[float]:
    """Trains `parameters` on the seen letters of `style`; yields the loss of every step."""
    data, objective, parameters = training_data(pipe, style, setting), process_for(pipe.scheduler), list(parameters)
    optimizer = torch.optim.AdamW(parameters, setting.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        setting.learning_rate,
        total_steps=setting.steps,
        pct_start=0.1,
        cycle_momentum=False,
    )
    for step in range(setting.steps):
        loss = _loss(pipe, objective, data, setting, generator(setting.seed, "demo", step))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()


def loss_over(pipe: DiTPipeline, data: Data, setting: Setting, batches: int) -> torch.Tensor:
    """The training loss over batches of its own, for a start from the gradient."""
    objective = process_for(pipe.scheduler)
    draws = (generator(setting.seed, "demo start", number) for number in range(batches))
    return torch.stack([_loss(pipe, objective, data, setting, draw) for draw in draws]).mean()


def _loss(pipe: DiTPipeline, objective: Process, data: Data, setting: Setting, draw: torch.Generator) -> torch.Tensor:
    """The mean loss of one random batch."""
    latents, labels = data
    chosen = torch.randint(len(latents), (setting.batch_size,), generator=draw)
    x0, c = latents[chosen], labels[chosen]
    c = c.masked_fill(torch.rand(len(c), generator=draw) < setting.label_dropout, NULL_CLASS)
    times = objective.sample_times([draw] * len(x0))
    noise = torch.randn(x0.shape, generator=draw)
    xt = objective.add_noise(x0, noise, times)
    output = pipe.transformer(xt, timestep=objective.timesteps(times), class_labels=c).sample
    return objective.loss(output, x0, noise, xt, times).mean()


@torch.no_grad()
def generate(
    pipe: DiTPipeline,
    seeds: Iterable[int],
    letters: str = LETTERS,
    guidance: float = GUIDANCE,
) -> torch.Tensor:
    """Every letter from every seed: grey images in [0, 1], (seeds, letters, H, W)."""
    ids = [LETTERS.index(letter) for letter in letters]
    rows = []
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        images: Any = pipe(ids, guidance, draw, INFERENCE_STEPS, output_type="np").images  # (letters, H, W, 3)
        rows.append(torch.from_numpy(images).mean(-1))
    return torch.stack(rows)


@torch.no_grad()
def denoising_loss(
    pipe: DiTPipeline,
    style: Face,
    letters: str = HELD_OUT_LETTERS,
    times: int = 16,
    seed: int = 0,
) -> float:
    """Mean loss over letters x `times` stratified times, each with its own fixed noise."""
    latents, labels = _examples(pipe, style, letters)
    objective = process_for(pipe.scheduler, density="uniform")
    total = 0.0
    for index, time in enumerate(objective.stratified_times(times)):
        t = time.expand(len(latents))
        noise = torch.randn(latents.shape, generator=generator(seed, "demo evaluation", index))
        xt = objective.add_noise(latents, noise, t)
        output = pipe.transformer(xt, timestep=objective.timesteps(t), class_labels=labels).sample
        total += objective.loss(output, latents, noise, xt, t).mean().item()
    return total / times


def evaluate(pipe: DiTPipeline, images: torch.Tensor, style: Face) -> Quality:
    """Measures generated `images` (seeds, 26, H, W) and the model that made them."""
    truth = glyph_images([style])[0] / 255
    iou = torch.stack([best_iou(row, truth) for row in images])  # (seeds, 26)
    held_out, seen = _ids(HELD_OUT_LETTERS), _ids(SEEN_LETTERS)
    nearest = torch.stack([nearest_glyph(row[held_out], truth) for row in images])
    right = (nearest == held_out).float().mean().item()
    iou_held_out, iou_seen = (
        iou[:, held_out].median().item(),
        iou[:, seen].median().item(),
    )
    return Quality(denoising_loss(pipe, style), iou_held_out, iou_seen, right)


def _ids(letters: str) -> torch.Tensor:
    return torch.tensor([LETTERS.index(letter) for letter in letters])


def _examples(pipe: DiTPipeline, style: Face, letters: str, variations: int = 0, seed: int = 0) -> Data:
    images, labels = glyph_images([style], letters, variations, seed, Jitter.moved)
    return encode(pipe, images), labels
