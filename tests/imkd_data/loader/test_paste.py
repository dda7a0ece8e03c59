"""Pasting: what collides, what enters a sample, that nothing else moves, and that (seed, epoch, position) decides it all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_cache import MemoryCache, rows_of

from imkd_data.classes import DETECTION_CLASSES
from imkd_data.errors import CacheDamageError
from imkd_data.loader.paste import Paster, rectangles_collide, write_bank
from imkd_data.loader.stream import stream
from imkd_data.sample import Boxes

FIELDS = ("lidar_points", "boxes")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> MemoryCache:
    return MemoryCache(tmp_path_factory.mktemp("paste"), scenes=3, keyframes=3)


@pytest.fixture(scope="module")
def bank(cache: MemoryCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bank") / "bank.npz"
    assert write_bank(cache, rows_of(cache, "train").tolist(), path, min_points=1) > 0
    return path


def corners(r: np.ndarray) -> np.ndarray:
    c, s = np.cos(r[4]), np.sin(r[4])
    local = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * r[2:4] / 2
    return local @ np.array([[c, s], [-s, c]]) + r[:2]


def test_collisions_equal_polygon_intersections() -> None:
    from shapely.geometry import Polygon

    rng = np.random.default_rng(0)
    a = np.column_stack([rng.uniform(-5, 5, (40, 2)), rng.uniform(0.3, 6, (40, 2)), rng.uniform(-4, 4, 40)])
    b = np.column_stack([rng.uniform(-5, 5, (30, 2)), rng.uniform(0.3, 6, (30, 2)), rng.uniform(-4, 4, 30)])
    found = rectangles_collide(a, b)
    expected = [[Polygon(corners(p)).intersection(Polygon(corners(q))).area > 1e-9 for q in b] for p in a]
    assert np.array_equal(found, expected) and 0.1 < found.mean() < 0.9
    # a cross overlaps although no corner lies in the other; neighbours that touch do not overlap
    cross = np.array([[0, 0, 6, 1, 0.0], [0, 0, 6, 1, np.pi / 2], [6, 0, 6, 1, 0.0]])
    assert rectangles_collide(cross, cross).tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert rectangles_collide(cross, np.zeros((0, 5))).shape == (3, 0)


def boxes_at(places: Any, label: int = 0) -> Boxes:
    places = np.asarray(places, dtype=np.float64).reshape(-1, 2)
    n = len(places)
    whole = np.zeros(n, dtype=np.int64)
    return Boxes(
        frame="ego",
        centre_m=np.column_stack([places, np.zeros(n)]),
        size_lwh_m=np.tile([4.0, 2.0, 2.0], (n, 1)),
        yaw_rad=np.zeros(n),
        velocity_mps=np.zeros((n, 2)),
        label=whole + label,
        score=np.ones(n),
        num_lidar=whole + 9,
        num_radar=whole,
        attribute=whole,
        visibility=whole,
    )


def hand_bank(path: Path) -> Path:
    """Three cars and a pedestrian with known points, written in the file's form."""
    car, walker = DETECTION_CLASSES.index("car"), DETECTION_CLASSES.index("pedestrian")
    order = sorted([(car, x) for x in (0.0, 10.0, 20.0)] + [(walker, 30.0)])
    rows, points = [], []
    for label, x in order:
        rows.append([x, 0, 0, 4, 2, 2, 0, 1.5, np.nan, label])
        points.append([[x + 0.1 * k, 0.2, 0.1, 0.5, 3, 0.05] for k in range(5)])
    labels = np.array([r[-1] for r in rows])
    np.savez(
        path,
        boxes=np.array(rows, dtype=np.float64),
        points=np.array(points, dtype=np.float32).reshape(-1, 6),
        offsets=np.arange(5) * 5,
        starts=np.searchsorted(labels, np.arange(len(DETECTION_CLASSES) + 1)),
    )
    return path


def test_counts_are_filled_up_and_occupied_places_stay_as_they_are(tmp_path: Path) -> None:
    paster = Paster(hand_bank(tmp_path / "b.npz"), until_epoch=5, counts={"car": 3, "pedestrian": 1})
    got = paster.draw(boxes_at([[10.0, 1.0]], label=DETECTION_CLASSES.index("barrier")), seed=0, epoch=0, position=0)
    assert got is not None and sorted(got.boxes[:, 0]) == [0.0, 20.0, 30.0]  # the car at 10 would stand in the barrier
    one_car = paster.draw(boxes_at([[50.0, 0.0], [60.0, 0.0]], label=0), seed=0, epoch=0, position=0)
    assert one_car is not None and (one_car.boxes[:, 9] == 0).sum() == 1  # two cars are there already
    assert paster.draw(boxes_at([[0, 0], [10, 0], [20, 0], [30, 0]]), seed=0, epoch=0, position=0) is None
    xyz = np.array([[20.5, 0, 0], [20.5, 3, 0], [0, 0, 5]], dtype=np.float32)
    points, features, age = got.into(xyz, np.zeros((3, 2), np.float32), np.zeros(3, np.float32))
    assert len(points) == len(features) == len(age) == 2 + 15  # the point inside the new car is gone, others stay
    assert not (points[:2] == xyz[0]).all(1).any() and np.allclose(features[2:], [0.5, 3]) and np.allclose(age[2:], 0.05)
    beside = got.beside(boxes_at([[10.0, 1.0]]))
    assert len(beside) == 4 and np.isnan(beside.velocity_mps[1:, 1]).all() and beside.velocity_mps[1, 0] == 1.5


def test_draws_depend_on_seed_epoch_and_position_alone(bank: Path) -> None:
    paster = Paster(bank, until_epoch=9)
    empty = boxes_at([])

    def places(**key: int) -> Any:
        got = paster.draw(empty, **{"seed": 1, "epoch": 2, "position": 3, **key})
        return None if got is None else got.boxes[:, :2].tolist()

    again = pickle.loads(pickle.dumps(paster))  # to a worker and back
    assert again.draw(empty, seed=1, epoch=2, position=3).boxes[:, :2].tolist() == places()
    assert any(places(position=p) != places() for p in range(8)) and any(places(epoch=e) != places() for e in range(8))


def test_the_bank_holds_the_cached_points_of_its_boxes(cache: MemoryCache, bank: Path, tmp_path: Path) -> None:
    with np.load(bank) as data:
        boxes, points, offsets, starts = (data[n] for n in ("boxes", "points", "offsets", "starts"))
    assert starts[0] == 0 and starts[-1] == len(boxes) and offsets[-1] == len(points)
    clouds = {int(r): cache.decode("lidar_points", int(r))["xyz_m"] for r in rows_of(cache, "train")}
    for i, box in enumerate(boxes):
        mine = points[offsets[i] : offsets[i + 1], :3]
        assert len(mine) >= 1 and starts[int(box[9])] <= i < starts[int(box[9]) + 1]
        d = mine - box[:3]
        c, s = np.cos(box[6]), np.sin(box[6])
        assert (np.abs(c * d[:, 0] + s * d[:, 1]) <= box[3] / 2 + 1e-5).all() and (np.abs(d[:, 2]) <= box[5] / 2 + 1e-5).all()
        assert any((np.abs(cloud[:, None] - mine[:1]) < 1e-6).all(-1).any() for cloud in clouds.values())
    again = tmp_path / "again.npz"
    write_bank(cache, rows_of(cache, "train").tolist(), again, min_points=1)
    with np.load(again) as data:
        assert np.array_equal(data["points"], points) and np.array_equal(data["boxes"], boxes, equal_nan=True)
    fewest = write_bank(cache, rows_of(cache, "train").tolist(), again, min_points=10**6)
    assert fewest == 0 and Paster(again, until_epoch=1).draw(boxes_at([]), seed=0, epoch=0, position=0) is None
    capped = write_bank(cache, rows_of(cache, "train").tolist(), again, min_points=1, per_class=1)
    assert capped <= len(np.unique(boxes[:, 9]))
    again.write_bytes(b"torn")
    with pytest.raises(CacheDamageError, match="bank of objects"):
        Paster(again, until_epoch=1).draw(boxes_at([]), seed=0, epoch=0, position=0)


def test_a_stream_pastes_before_the_augmentation_and_stops_in_time(cache: MemoryCache, bank: Path) -> None:
    def batches(epoch: int, paste: bool, augment: bool, **more: Any) -> list[Any]:
        made = stream(cache, 1, fields=FIELDS, augment=augment, seed=4, epoch=epoch, shuffle="none", **more)
        if paste:
            made.reader.paste = Paster(bank, until_epoch=1)
        return list(made)

    for augment in (False, True):
        added = 0
        for a, b in zip(batches(0, False, augment), batches(0, True, augment), strict=True):
            more = int(b.boxes.valid_BM.sum() - a.boxes.valid_BM.sum())
            added += more
            for m in range(b.boxes.valid_BM.shape[1] - more, b.boxes.valid_BM.shape[1]):
                d = (b.lidar.xyz_m - b.boxes.centre_m_BM3[0, m]).numpy()
                yaw, size = float(b.boxes.yaw_rad_BM[0, m]), b.boxes.size_lwh_m_BM3[0, m].numpy()
                along = np.cos(yaw) * d[:, 0] + np.sin(yaw) * d[:, 1]
                across = -np.sin(yaw) * d[:, 0] + np.cos(yaw) * d[:, 1]
                local = np.abs(np.stack([along, across, d[:, 2]], 1))
                assert (local <= size / 2 + 1e-3).all(1).sum() >= 1  # its points moved with it
        assert added > 0
        named = batches(0, True, augment, lidar_features=("intensity", "ring", "near_m"))
        plain = batches(0, False, augment, lidar_features=("near_m",))
        assert all((a.lidar.column("near_m").isinf() == (a.lidar.age_s == 0)).all() for a in plain)
        never = [b.lidar.column("near_m").isinf() & (b.lidar.age_s > 0) for b in named]  # pasted points stay, old or not
        assert any(n.any() for n in never)
        for b, c in zip(batches(0, True, augment), named, strict=True):
            assert c.lidar.features_NF[:, :2].equal(b.lidar.features_NF)
    for a, b in zip(batches(1, False, True), batches(1, True, True), strict=True):
        assert a.lidar.xyz_m.equal(b.lidar.xyz_m) and a.boxes.valid_BM.equal(b.boxes.valid_BM)
