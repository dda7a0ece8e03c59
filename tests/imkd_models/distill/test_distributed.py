"""Two devices give the loss of one device with the joined batch, with all objects on one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distill_devices import NAMES, run, worker


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, float]]]:
    folder = tmp_path_factory.mktemp("devices")
    torch.multiprocessing.spawn(worker, args=(str(folder / "rendezvous"), str(folder)), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_two_devices_equal_one(name: str, two_devices: list[dict[str, dict[str, float]]]) -> None:
    joined = run(name, None)
    for key, value in joined.items():
        mean = sum(device[name][key] for device in two_devices) / 2
        assert mean == pytest.approx(value, rel=2e-4, abs=1e-7), key
