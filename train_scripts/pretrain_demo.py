"""Makes the demo's base model: a small class-conditional DiT that draws capitals in many faces.

    python train_scripts/pretrain_demo.py --output slora_diffusers/demo/base --threads 2

The result is a stock `DiTPipeline` folder: a one-block AutoencoderKL whose single latent channel is the image's grey
value (standardised), a DiTTransformer2DModel trained on the velocity of the straight path from image to noise, and a
scheduler that says so (`prediction_type="flow_prediction"`). The class is the letter; the face is free, so a sample
comes in any of the pretraining faces. Everything follows from `--seed`; a snapshot of the averaged weights is written
every `--snapshot-every` steps in its final layout, so the run may be stopped at any time.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import time
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from slora_diffusers.demo.glyphs import CORE_FACES, IMAGE_SIZE, LETTERS, PRETRAINING_FACES, glyph_images, to_pixels
from slora_diffusers.training.diffusion.processes import Process, process_for

FACES = {"all": PRETRAINING_FACES, "core": CORE_FACES}
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
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,  # DiTPipeline reads it, so it cannot be left to the default
        num_layers=6,
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


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int, seed: int) -> None:
    """Near identity: reconstruct the image, with the latent anchored to the standardised grey value."""
    pixels = images.float() / 127.5 - 1
    mean, std = pixels.mean(), pixels.std()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        x = to_pixels(images[torch.randint(len(images), (32,), generator=generator)])
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
    transformer: torch.nn.Module,
    x0: torch.Tensor,
    labels: torch.Tensor,
    draw: torch.Generator,
) -> torch.Tensor:
    """The velocity loss at logit-normal times (arXiv 2403.03206), with a tenth of the labels dropped."""
    times = torch.randn(len(x0), generator=draw).sigmoid()
    noise = torch.randn(x0.shape, generator=draw)
    labels = labels.masked_fill(torch.rand(len(x0), generator=draw) < 0.1, NULL_CLASS)
    xt = objective.add_noise(x0, noise, times)  # (B, C, H, W)
    output = transformer(xt, timestep=objective.timesteps(times), class_labels=labels).sample
    return objective.loss(output, x0, noise, xt, times).mean()


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
    parser.add_argument("--faces", choices=FACES, default="all", help="which faces to draw")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--vae-steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--variations", type=int, default=48, help="jittered copies of each glyph")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights")
    parser.add_argument("--snapshot-every", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    images, labels = glyph_images(FACES[args.faces], variations=args.variations, seed=args.seed)
    print(f"{len(images)} glyphs of {len(FACES[args.faces])} faces", flush=True)
    vae, transformer = build_vae(), build_transformer()
    if args.initial is not None:
        earlier = DiTPipeline.from_pretrained(args.initial, dtype=torch.float32)
        vae.load_state_dict(earlier.vae.state_dict())
        transformer.load_state_dict(earlier.transformer.state_dict())
    else:
        train_vae(vae, images, args.vae_steps, args.seed)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_pixels(batch)).latent_dist.mode() for batch in images.split(256)])
    print(f"latents: mean {latents.mean():.3f} std {latents.std():.3f}", flush=True)

    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = 100
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
        chosen = torch.randint(len(latents), (args.batch_size,), generator=generator)
        loss = training_loss(objective, transformer, latents[chosen], labels[chosen], generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
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
