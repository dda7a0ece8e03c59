"""One process of a two-device run, started by test_distributed: half of the batch, terms written to a file."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import torch
from distill_fakes import FUSION, GRID, LABEL, LIDAR, STUDENT, FakeNet, fake_batch, fake_outputs, without_boxes

from imkd_data.loader.batch import Batch
from imkd_models.distill import METHODS, FrozenTeacher
from imkd_models.outputs import Outputs

SHAPES = {"lidar": LIDAR, "label": LABEL, "fusion": FUSION}
NAMES = ("imkd", "adaptive_smooth", "dual_distill")


def joined_batch() -> Batch:
    """Two samples; all objects lie in the first, so the second device has none."""
    return without_boxes(fake_batch(), [1])


def part_of_batch(batch: Batch, i: int) -> Batch:
    one = slice(i, i + 1)
    boxes = replace(batch.boxes, **{f.name: getattr(batch.boxes, f.name)[one] for f in fields(batch.boxes)})
    return replace(
        batch,
        tokens=batch.tokens[one],
        timestamp_us_B=batch.timestamp_us_B[one],
        bev_from_ego_B44=batch.bev_from_ego_B44[one],
        boxes=boxes,
        bev_maps={k: v[one] for k, v in batch.bev_maps.items()},
    )


def part_of_outputs(outputs: Outputs, i: int) -> Outputs:
    one = slice(i, i + 1)
    head = tuple(
        replace(m, **{f.name: getattr(m, f.name)[one] for f in fields(m) if f.name != "classes"}) for m in outputs.head
    )
    return replace(outputs, features={k: v[one] for k, v in outputs.features.items()}, head=head)


def run(name: str, part: int | None) -> dict[str, float]:
    """Terms of two calls (running statistics take part) on the joined batch or on one of its samples."""
    torch.manual_seed(0)
    method = METHODS[name]
    options = method.make_options({"tau": 1.0, "nms": "circle"} if name == "dual_distill" else {})
    teachers = {n: FrozenTeacher(FakeNet(SHAPES[n], seed=3)) for n in method.teachers_for(options)}
    distiller = method.build(options, FakeNet(STUDENT, seed=1), teachers, GRID).train()
    for module in distiller.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    batch = joined_batch()
    out: dict[str, float] = {}
    for call in range(2):
        student = fake_outputs(STUDENT, 10 + call)
        taught = {n: fake_outputs(SHAPES[n], 20 + call) for n in teachers}
        if part is not None:
            student, taught = part_of_outputs(student, part), {n: part_of_outputs(o, part) for n, o in taught.items()}
        terms = distiller(student, taught, batch if part is None else part_of_batch(batch, part))
        out.update({f"{call}.{k}": float(v.detach()) for k, v in terms.items()})
    return out


def worker(rank: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.save({name: run(name, rank) for name in NAMES}, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
