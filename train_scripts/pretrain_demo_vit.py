"""Makes the base of the demo's vision part: a tiny ViT that tells the 26 capitals apart on plain grounds.

    python train_scripts/pretrain_demo_vit.py --output slora_diffusers/demo/vit_base

The result is a stock `ViTModel` folder in fp16, without a head. It is trained to classify letters of any colour on any
plain colour, in the faces that the demo's DiT was pretrained on: it never saw a photograph, a mask, nor a script,
calligraphic or black-letter face. Everything follows from `--seed`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel, get_cosine_schedule_with_warmup

from slora_diffusers.demo.glyphs import CORE_FACES, IMAGE_SIZE, LETTERS, glyph_images
from slora_diffusers.demo.scenes import compose, scenes
from slora_diffusers.heads.preprocessing import Preprocessing

PREPARE = Preprocessing((IMAGE_SIZE, IMAGE_SIZE))
PROCESSOR = {  # the same, as transformers' image processors read it
    "image_processor_type": "ViTImageProcessor", "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "image_mean": PREPARE.mean, "image_std": PREPARE.std,
}  # fmt: skip


class Classifier(nn.Module):
    """The ViT and a linear layer on its class token and the mean of its patches; the layer is thrown away."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=width, num_hidden_layers=blocks, num_attention_heads=4, intermediate_size=4 * width,
            image_size=IMAGE_SIZE, patch_size=4,
        )  # fmt: skip
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(2 * width, len(LETTERS))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> logits (B, 26)."""
        states = self.vit(PREPARE.normalize(images)).last_hidden_state  # (B, 1 + 64, d)
        return self.head(torch.cat([states[:, 0], states[:, 1:].mean(1)], dim=1))


@torch.inference_mode()
def accuracy(model: nn.Module, seed: int) -> float:
    """On the same faces over a photograph, in percent."""
    held_out = scenes(CORE_FACES, 2, seed + 1, held_out=True)
    predicted = torch.cat([model(images).argmax(1) for images in held_out.images.split(208)])
    return 100 * (predicted == held_out.labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("slora_diffusers/demo/vit_base"))
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--variations", type=int, default=24, help="jittered copies of each glyph")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    glyphs, labels = glyph_images(CORE_FACES, variations=args.variations, seed=args.seed)
    draw = torch.Generator().manual_seed(args.seed)
    behind = torch.rand(8192, 3, 1, 1, generator=draw).expand(-1, 3, IMAGE_SIZE, IMAGE_SIZE)
    model = Classifier(args.width, args.blocks)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    started = time.time()
    for step in range(1, args.steps + 1):
        chosen = torch.randint(len(glyphs), (args.batch_size,), generator=draw)
        under = behind[torch.randint(len(behind), (args.batch_size,), generator=draw)]
        loss = F.cross_entropy(model(compose(glyphs[chosen], under, draw)), labels[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}/{args.steps} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)
    print(f"over a photograph: {accuracy(model.eval(), args.seed):.1f} %")
    model.vit.half().save_pretrained(args.output)
    (args.output / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
