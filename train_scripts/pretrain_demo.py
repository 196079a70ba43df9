"""Makes the demo's base model: a small class-conditional DiT that draws capitals in many faces.

    python train_scripts/pretrain_demo.py --fonts FOLDER --initial slora_diffusers/demo/base --output new_base

The result is a stock `DiTPipeline` folder: a one-block AutoencoderKL whose single latent channel is the image's grey
value (standardised), a DiTTransformer2DModel trained on the velocity of the straight path from image to noise, and a
scheduler that says so (`prediction_type="flow_prediction"`). The class is the letter; the face is free, so a sample
comes in any of the pretraining faces. `slora_diffusers/demo/base/README.md` says which fonts the shipped one saw and
how to get them; without `--fonts` it sees what matplotlib ships.

In training alone, half of the samples are told their face: a learnt vector of the face is added to every patch, as a
style that all letters share. The other half, and everyone who uses the model, do without. The idea is that hidden
states hold the style apart from the letter, so that an adapter that shifts it shifts it for all letters; this was not
measured beside training without.

Everything follows from `--seed`; a snapshot of the averaged weights is written every `--snapshot-every` steps in its
final layout, so the run may be stopped at any time.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
)
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from slora_diffusers.demo.fonts import Faces, read_faces
from slora_diffusers.demo.glyphs import IMAGE_SIZE, LETTERS, to_pixels
from slora_diffusers.training.diffusion.processes import Process, process_for

WIDTH, HEADS, BLOCKS, STYLE = 128, 4, 6, 32
NULL_CLASS = 1000  # the id that DiTPipeline hard-codes for "no class"


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=1,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def build_transformer() -> DiTTransformer2DModel:
    transformer = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=1,
        out_channels=1,  # DiTPipeline reads it, so it cannot be left to the default
        num_layers=BLOCKS,
        sample_size=IMAGE_SIZE,
        patch_size=4,
        num_embeds_ada_norm=NULL_CLASS,
    )
    # The initialisation of the DiT paper (arXiv 2212.09748): every block starts as the identity.
    block: Any
    for block in transformer.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
        torch.nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    for layer in (transformer.proj_out_1, transformer.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    # Each block's LabelEmbedding would drop labels on its own in train mode. There is no other train-mode behaviour
    # in this model, so it stays in eval mode and labels are dropped once per batch.
    return transformer.eval()


class Drawer:
    """Draws glyphs at random: moved, stretched, slanted, thinner or bolder."""

    changes = 6  # numbers that say how a glyph was changed

    def __init__(self, faces: Faces) -> None:
        self.glyphs, self.shares = faces.glyphs, faces.shares

    def __call__(self, count: int, draw: torch.Generator) -> Batch:
        face = torch.multinomial(self.shares, count, replacement=True, generator=draw)
        letter = torch.randint(len(LETTERS), (count,), generator=draw)
        changes = torch.rand(count, self.changes, generator=draw) * 2 - 1  # (B, 6) in [-1, 1]
        x, y, size, aspect, slant, weight = changes.T
        glyphs = self.glyphs[face, letter][:, None].float() / 255  # (B, 1, 64, 64)
        bolder, thinner = F.max_pool2d(glyphs, 3, 1, 1), -F.max_pool2d(-glyphs, 3, 1, 1)
        weight = weight[:, None, None, None]
        glyphs = glyphs + 0.6 * weight.clamp(min=0) * (bolder - glyphs) + 0.3 * weight.clamp(max=0) * (glyphs - thinner)
        size, aspect = 0.99 + 0.08 * size, 1 + 0.08 * aspect
        zero, shift = torch.zeros(count), 2 * 1.5 / IMAGE_SIZE  # 1.5 pixels, where the image spans [-1, 1]
        inverse = torch.stack([
            1 / (size * aspect), 0.12 * slant, shift * x,
            zero, aspect / size, shift * y,
        ], dim=1).view(count, 2, 3)  # fmt: skip
        grid = F.affine_grid(inverse, list(glyphs.shape), align_corners=False)
        moved = F.grid_sample(glyphs, grid, align_corners=False)
        images = F.avg_pool2d(moved, moved.shape[-1] // IMAGE_SIZE)[:, 0]  # (B, 32, 32) in [0, 1]
        return Batch(to_pixels(images * 255), letter, face, changes)


@dataclass(frozen=True)
class Batch:
    """Pixels (B, 3, 32, 32) in [-1, 1], letters (B,), faces (B,) and how each glyph was changed (B, 6)."""

    pixels: torch.Tensor
    letters: torch.Tensor
    faces: torch.Tensor
    changes: torch.Tensor


class Styles(nn.Module):
    """A vector for each face and its changes, added to every patch: (B,), (B, 6) -> (B, 1, d)."""

    def __init__(self, faces: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(faces, STYLE)
        nn.init.normal_(self.table.weight, std=0.3)
        self.project = nn.Linear(STYLE + Drawer.changes, width, bias=False)
        nn.init.normal_(self.project.weight, std=0.02)

    def forward(self, faces: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
        return self.project(torch.cat([self.table(faces), changes], dim=1))[:, None]


def train_vae(vae: AutoencoderKL, drawer: Drawer, steps: int, seed: int) -> None:
    """Near identity: reconstruct the image, with the latent anchored to the standardised grey value."""
    pixels = drawer(1024, torch.Generator().manual_seed(seed)).pixels
    mean, std = pixels.mean(), pixels.std()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        x = drawer(32, generator).pixels
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        anchor = F.mse_loss(posterior.mean, (x[:, :1] - mean) / std)
        kl = posterior.kl().mean() / IMAGE_SIZE**2
        loss = F.mse_loss(reconstruction, x) + anchor + 1e-3 * kl
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"vae {step}/{steps} loss {loss.item():.5f} anchor {anchor.item():.5f} "
                  f"pixel rmse {F.mse_loss(reconstruction, x).sqrt().item():.4f}", flush=True)  # fmt: skip


def training_loss(
    objective: Process,
    transformer: Any,
    styles: Styles,
    x0: torch.Tensor,
    batch: Batch,
    draw: torch.Generator,
) -> torch.Tensor:
    """The velocity loss at logit-normal times (arXiv 2403.03206).

    A tenth of the samples are not told their letter, and half of them not their face.
    """
    times = (0.5 + torch.randn(len(x0), generator=draw)).sigmoid()  # strokes are settled where there is much noise
    noise = torch.randn(x0.shape, generator=draw)
    letters = batch.letters.masked_fill(torch.rand(len(x0), generator=draw) < 0.1, NULL_CLASS)
    told = torch.rand(len(x0), 1, 1, generator=draw) < 0.5
    xt = objective.add_noise(x0, noise, times)  # (B, C, H, W)
    style = styles(batch.faces, batch.changes) * told  # (B, 1, d)
    hook = transformer.pos_embed.register_forward_hook(lambda module, args, patches: patches + style)
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward is slow
        output = transformer(xt, timestep=objective.timesteps(times), class_labels=letters).sample
    hook.remove()
    return objective.loss(output.float(), x0, noise, xt, times).mean()


def build_scheduler() -> Any:
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        final_sigmas_type="zero",
    )


def build_pipeline(vae: AutoencoderKL, transformer: Any) -> DiTPipeline:
    pipe = DiTPipeline(
        transformer=copy.deepcopy(transformer),
        vae=copy.deepcopy(vae),
        scheduler=build_scheduler(),
    )
    pipe.register_to_config(id2label={str(index): letter for index, letter in enumerate(LETTERS)})
    with torch.no_grad():  # class ids that have no letter are never read: zeros compress to nothing
        for block in pipe.transformer.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight[len(LETTERS) : NULL_CLASS] = 0
    pipe.set_progress_bar_config(disable=True)
    return pipe


def snapshot(pipe: DiTPipeline, output: Path, grids: Path, step: int, seed: int) -> None:
    """Saves the fp16 folder and one grid of samples: the 26 letters at guidance 1.5, 2.5 and 4."""
    rows = []
    for row, guidance in enumerate((1.5, 2.5, 4.0)):
        generator = torch.Generator().manual_seed(seed + row)
        samples = pipe(list(range(len(LETTERS))), guidance, generator, 20, output_type="np").images  # (26, H, W, 3)
        grey = torch.from_numpy(samples).mean(-1)  # pyright: ignore[reportArgumentType]
        rows.append(F.pad(grey, (1, 1, 1, 1), value=0.3).permute(1, 0, 2).flatten(1))  # (H, 26 W)
    grid = (torch.cat(rows) * 255).round().to(torch.uint8).numpy()
    grids.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(grids / f"step_{step:06d}.png")
    partial = output.with_name(output.name + ".partial")
    pipe.to(dtype=torch.float16).save_pretrained(partial)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("slora_diffusers/demo/base"))
    parser.add_argument("--grids", type=Path, default=Path("outputs/pretrain_demo"))
    parser.add_argument("--initial", type=Path, help="start from the weights of an earlier run's folder")
    parser.add_argument("--fonts", type=Path, help="a folder of fonts to draw as well as matplotlib's")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--vae-steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights")
    parser.add_argument("--snapshot-every", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    faces = read_faces(args.fonts)
    drawer = Drawer(faces)
    vae, transformer = build_vae(), build_transformer()
    if args.initial is not None:
        earlier = DiTPipeline.from_pretrained(args.initial, dtype=torch.float32)
        vae.load_state_dict(earlier.vae.state_dict())
        transformer.load_state_dict(earlier.transformer.state_dict())
    else:
        train_vae(vae, drawer, args.vae_steps, args.seed)
    vae.eval().requires_grad_(False)
    styles = Styles(len(faces.names), WIDTH)
    trained = [*transformer.parameters(), *styles.parameters()]

    optimizer = torch.optim.AdamW(
        [{"params": list(transformer.parameters()), "lr": 1.0}, {"params": list(styles.parameters()), "lr": 3.0}],
        betas=(0.9, 0.99),
        weight_decay=0.0,
    )
    warmup = 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: (
            args.learning_rate
            * min(
                (k + 1) / warmup,
                0.02 + 0.98 * math.cos(math.pi / 2 * k / args.steps) ** 2,
            )
        ),
    )
    average = AveragedModel(transformer, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    objective = process_for(build_scheduler())
    started, running = time.time(), 0.0
    for step in range(1, args.steps + 1):
        generator = torch.Generator().manual_seed((args.seed + 1) * 1_000_003 + step)
        batch = drawer(args.batch_size, generator)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            x0 = vae.encode(batch.pixels).latent_dist.mode().float()
        loss = training_loss(objective, transformer, styles, x0, batch, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update_parameters(transformer)
        running += loss.item()
        if step % 50 == 0:
            print(
                f"step {step}/{args.steps} loss {running / 50:.4f} {time.time() - started:.0f} s",
                flush=True,
            )
            running = 0.0
        if step % args.snapshot_every == 0 or step == args.steps:
            snapshot(
                build_pipeline(vae, average.module),
                args.output,
                args.grids,
                step,
                args.seed,
            )


if __name__ == "__main__":
    main()
