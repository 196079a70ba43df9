"""Two of these, under torchrun, start an adapter from the gradient: `initialise_worker.py FOLDER PROCESSES HOW`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import slora_diffusers as sl
from tests.tiny.pipelines import tiny_sd3_pipeline


def main(folder, processes, how):
    rank, world = 0, 1
    if processes > 1:
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    model = tiny_sd3_pipeline().transformer
    torch.manual_seed(rank if how == "plain" else 0)  # what the processes have drawn may differ, too
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=4))
    called = model
    if how == "fsdp2" and processes > 1:
        mesh = init_device_mesh("cpu", (world,))
        for block in model.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if how == "ddp" and processes > 1:
        called = DistributedDataParallel(model, find_unused_parameters=True)

    def backward():
        draw = torch.Generator().manual_seed(0)
        for _ in range(2):
            x, target = (torch.randn(4, 4, 16, 16, generator=draw) for _ in range(2))
            t, text, pooled = (
                torch.rand(4, generator=draw) * 1000,
                torch.randn(4, 8, 32, generator=draw),
                torch.ones(4, 32),
            )
            mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
            output = called(x[mine], text[mine], pooled[mine], t[mine]).sample
            ((output - target[mine]) ** 2).mean().backward()

    report = sl.initialize_serial_lora(called, backward)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert report.energies and len(report.unchanged) < len(report.energies)
    sl.save_serial_lora(
        model, folder / str(rank) if how != "fsdp2" else folder, is_main_process=how != "fsdp2" or not rank
    )
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
