"""A training step and a prediction under a GPU's rules of devices and types, without a GPU (see ``card.py``)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import toy_cache, toy_run, toy_teachers

from imkd_data.loader.stream import stream
from imkd_models.distill import METHODS, make_method
from imkd_models.head import decode
from pipelines.networks import build_networks, place, stream_values

sys.path.insert(0, str(Path(__file__).parents[1]))
from card import CARD, Card, OnCard, WrongDeviceError, a_card

# How often the host may wait for the card in a training step's forward pass and losses; each wait leaves the card idle.
WAITS = {"lidar": 2, "label": 1, "fusion": 2, "student": 3, "imkd": 4, "crkd": 5, "adaptive_smooth": 12, "dual_distill": 60}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Path]]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("card")
    cache = toy_cache(root / "world")
    return cache, toy_teachers(cache, root)


@pytest.fixture
def card() -> Iterator[Card]:
    with a_card() as mode:
        if mode is None:
            pytest.skip("gpu: a real card is here, or this torch cannot be lent a pretended one")
        yield mode


def test_the_pretended_card_refuses_what_a_card_refuses(card: Card) -> None:
    a, b = torch.arange(6.0, device=CARD), torch.arange(6.0)
    assert isinstance(a, OnCard) and a.device == CARD and float((a + b.to(CARD)).sum()) == 30
    with pytest.raises(WrongDeviceError):
        a + b
    with pytest.raises(WrongDeviceError):
        a[2:4].copy_(b[2:4]), a.index_add(0, torch.tensor([0]), a[:1])
    with pytest.raises(TypeError):
        a.numpy()
    card.waits.clear()
    assert (a + b[3]).tolist()[0] == 3 and a[torch.tensor([1, 2])].shape == (2,) and not bool((a > 9).any())
    assert sum(card.waits.values()) == 2
    a[2:4] = 7.0
    assert a.cpu().tolist() == [0, 1, 7, 7, 4, 5]
    linear = torch.nn.Linear(6, 2).to(CARD)
    with torch.autocast("cuda", torch.bfloat16):
        assert linear(a).dtype == torch.bfloat16 and linear(a).softmax(0).dtype == torch.float32


@pytest.mark.parametrize("name", ["lidar", "label", "fusion", "student", *METHODS])
def test_a_step_on_a_card(name: str, world: tuple[Any, dict[str, Path]], card: Card) -> None:
    cache, teachers = world
    given: dict[str, Path] = {"lidar": teachers["lidar"]} if name == "label" else {}
    run = toy_run("student", method=name) if name in METHODS else toy_run(name)
    if name in METHODS:
        method = make_method(name)
        given = {n: teachers[n] for n in method.teachers_for(method.make_options({}))}
    networks = build_networks(run, given)
    batch = next(iter(stream(cache, 2, device=CARD, **stream_values(networks))))
    unit = place(networks, CARD).to(CARD).train()
    card.waits.clear()
    with torch.autocast("cuda", torch.bfloat16):
        terms = unit(batch)
    assert sum(card.waits.values()) <= WAITS[name], dict(card.waits)
    assert all(isinstance(v, OnCard) and v.dtype == torch.float32 and bool(v.isfinite()) for v in terms.values())
    networks.model.eval()
    with torch.no_grad():
        outputs = networks.model(batch)
        if outputs.head:
            assert all(f.score.device == CARD for f in decode(outputs.head, outputs.grid))
