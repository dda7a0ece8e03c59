"""One training step on one or two gloo ranks, gradients written by rank 0: python ddp_step.py CACHE LIDAR LABEL OUT KIND."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from toy_training import toy_cache, toy_run

from imkd_data.loader.stream import stream
from pipelines.machine import Machine, make_fabric
from pipelines.networks import TrainUnit, build_networks, stream_values
from pipelines.optimise import make_optimiser


def main(cache: str, lidar: str, label: str, out: str, kind: str) -> None:
    torch.set_num_threads(1)
    run = toy_run(kind, method="imkd" if kind == "student" else None)
    fabric = make_fabric(run, Machine(accelerator="cpu"))
    world, rank = fabric.world_size, fabric.global_rank
    networks = build_networks(run, {"lidar": lidar, "label": label} if kind == "student" else {})
    plain = TrainUnit(networks)
    unit, _ = fabric.setup(plain, make_optimiser(plain.model, plain.distiller, run.optim))
    unit.train()
    for module in unit.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    rows = [1, 2, 0, 4]  # one box, one box, none, one
    order = {"rows": rows, "shuffle": "none", "rank": rank, "world": world}
    batches = stream(toy_cache(Path(cache)), 4 // world, **order, **stream_values(networks))
    batch = next(iter(batches))
    terms = unit(batch)
    loss = sum(terms.values())
    fabric.backward(loss)
    mean = fabric.all_reduce(loss.detach(), reduce_op="mean")
    boxes = fabric.all_gather(batch.boxes.valid_BM.sum()).reshape(-1)
    if rank == 0:
        gradients = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        torch.save({"loss": mean, "boxes": boxes, "gradients": gradients, "world": world}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
