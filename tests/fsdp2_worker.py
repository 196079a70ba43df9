"""Two of these, under torchrun, train a sharded SD3: `fsdp2_worker.py <output folder> <processes>`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from slora_diffusers import SerialLoraConfig, add_serial_lora, save_serial_lora
from slora_diffusers.training.checkpoint import gathered, load_optimizer, load_parameters
from slora_diffusers.training.precision import trainable
from tests.tiny.pipelines import tiny_sd3_pipeline


def sharded(world):
    torch.manual_seed(0)
    model = tiny_sd3_pipeline().transformer
    add_serial_lora(model, SerialLoraConfig(rank=4))
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for block in model.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable([model])], lr=1e-2)
    return model, optimizer


def step(model, optimizer, number, rank, world):
    draw = torch.Generator().manual_seed(number)
    x, target = (torch.randn(4, 4, 16, 16, generator=draw) for _ in range(2))
    t, text, pooled = torch.rand(4, generator=draw) * 1000, torch.randn(4, 8, 32, generator=draw), torch.ones(4, 32)
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    output = model(x[mine], text[mine], pooled[mine], t[mine]).sample
    ((output - target[mine]) ** 2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def main(folder, processes):
    rank, world = 0, 1
    if processes > 1:
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    model, optimizer = sharded(world)
    for number in range(3):
        step(model, optimizer, number, rank, world)
    state = {"trained": gathered(dict(trainable([model]))), "optimizer": gathered(optimizer.state_dict())}
    step(model, optimizer, 3, rank, world)
    save_serial_lora(model, folder / "through", is_main_process=rank == 0)
    again, its_optimizer = sharded(world)
    load_parameters(trainable([again]), state["trained"])
    load_optimizer(its_optimizer, state["optimizer"])
    step(again, its_optimizer, 3, rank, world)
    save_serial_lora(again, folder / "resumed", is_main_process=rank == 0)
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
