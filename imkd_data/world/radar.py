"""Five ARS 408-like radars: few points with a true radial velocity, binary PCD with the 18 nuScenes fields.

Velocities follow the genuine files: raw (vx, vy) is relative to the sensor on a 0.25 m/s grid, and (vx_comp, vy_comp) is the
radial part of raw velocity plus the sensor's own motion, hence exactly radial, with the grid's residue on standing things.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imkd_data.geometry import F64
from imkd_data.kernels import raycast
from imkd_data.world import rig as rigs
from imkd_data.world.options import random_stream
from imkd_data.world.scene import Primitives, Scene

FIELDS = (
    "x", "y", "z", "dyn_prop", "id", "rcs", "vx", "vy", "vx_comp", "vy_comp", "is_quality_valid", "ambig_state",
    "x_rms", "y_rms", "invalid_state", "pdh0", "vx_rms", "vy_rms",
)  # fmt: skip
_SIZES = (4, 4, 4, 1, 2, 4, 4, 4, 4, 4, 1, 1, 1, 1, 1, 1, 1, 1)
_TYPES = "FFFIIFFFFFIIIIIIII"
POINT = np.dtype([(n, f"<{'f' if t == 'F' else 'i'}{s}") for n, t, s in zip(FIELDS, _TYPES, _SIZES, strict=True)])
MAX_POINTS = 125
PADDING_BYTES = 3726
NEAR_M, NEAR_HALF_RAD = 70.0, np.radians(60.0)
FAR_M, FAR_HALF_RAD = 250.0, np.radians(9.0)
TWO_RAY_M = 80.0

# Mean radar cross-section (dBsm), number of reflection centres, and how often a near centre is reported, by category. The last
# makes boxes hold radar points about as often as genuine ones do: nearly every truck, most cars, few people, hardly a cone.
_RCS = {
    "vehicle.car": (9.0, 3, 0.55), "vehicle.truck": (15.0, 6, 0.8), "vehicle.bus.rigid": (16.0, 8, 0.8),
    "vehicle.trailer": (16.0, 7, 0.8), "vehicle.construction": (14.0, 5, 0.7), "vehicle.motorcycle": (3.0, 2, 0.35),
    "vehicle.bicycle": (0.5, 2, 0.45), "vehicle.emergency.police": (9.0, 3, 0.55), "movable_object.barrier": (2.0, 2, 0.4),
    "movable_object.trafficcone": (-3.0, 1, 0.1), "movable_object.pushable_pullable": (0.0, 1, 0.4),
}  # fmt: skip
_PERSON_RCS = (-2.5, 1, 0.35)
# At this range a centre is reported half as often: its resolution cell holds other things too. Doppler tells a mover from them.
_MERGE_STILL_M, _MERGE_MOVING_M = 28.0, 80.0
_INVALID_GHOST = np.array([3, 4, 9, 11, 12, 15, 16, 10])
_INVALID_SHARE = np.array([0.02, 0.26, 0.2, 0.3, 0.01, 0.05, 0.14, 0.02])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Echoes:
    """Candidate echoes of one scan: global x, y, velocity, rcs, share of scans in which the sensor tells them from what is
    around, and what they belong to (-1: nothing that moves)."""

    xy_m: F64
    velocity_mps: F64
    rcs_dbsm: F64
    told: F64
    owner: NDArray[np.int64]


class RadarModel:
    """The radars of one scene. Standing scatterers are drawn once, so they stay in place from scan to scan."""

    def __init__(self, scene: Scene, rig: rigs.Rig) -> None:
        self.scene, self.rig = scene, rig
        rng = random_stream(scene.seed, scene.index, "radar scatterers")
        self.still_xy, self.still_rcs = _standing_scatterers(scene, rng)
        traits = np.array([_RCS.get(a.category, _PERSON_RCS) for a in scene.actors])
        self.owner = np.repeat(np.arange(len(traits)), traits[:, 1].astype(np.int64))
        mean, _, self.told = traits[self.owner].T
        size = np.array([scene.actors[a].size_lwh_m for a in self.owner])
        # Reflection centres sit near the outline, corners and wheel arches.
        spot = rng.uniform(-1, 1, (len(self.owner), 2))
        edge = rng.random(len(self.owner)) < 0.5
        spot[edge, 0] = np.sign(spot[edge, 0])
        spot[~edge, 1] = np.sign(spot[~edge, 1])
        self.spot = spot * (size[:, :2] / 2 - 0.12)
        self.rcs = mean + 4.0 * rng.standard_normal(len(self.owner)) - 3.0

    def scan(self, channel: str, t_s: float, things: Primitives, tree: raycast.Tree) -> NDArray[np.void]:
        """One scan (P,) of dtype ``POINT`` in the sensor frame. ``things`` and ``tree``: primitives near the instant."""
        rng = random_stream(self.scene.seed, self.scene.index, f"{channel}@{self.scene.timestamp_us(t_s)}")
        rotation, origin, own = self._sensor(channel, t_s)
        echoes = self._echoes(t_s, origin)
        relative = (echoes.xy_m - origin[:2]) @ rotation[:2, :2]  # global -> sensor axes
        keep = _seen(relative, echoes.rcs_dbsm, echoes.told, rng)
        keep = keep[self._open(echoes, keep, origin, relative, things, tree, rng)]
        xy, rcs = relative[keep], echoes.rcs_dbsm[keep] + 1.5 * rng.standard_normal(len(keep))
        velocity = echoes.velocity_mps[keep] @ rotation[:2, :2]
        moves = (np.hypot(velocity[:, 0], velocity[:, 1]) > 0.5) & (echoes.owner[keep] >= 0)
        return _points(xy, velocity, rcs, moves, own @ rotation[:2, :2], rng)

    def _sensor(self, channel: str, t_s: float) -> tuple[F64, F64, F64]:
        """global_from_sensor rotation and origin, and the sensor's own velocity (2,) in the global frame."""
        mount = self.rig.poses[channel]
        rotation, translation = self.scene.ego.poses(np.array([t_s, t_s - 0.01, t_s + 0.01]))
        at = rotation @ mount.translation_m + translation
        return rotation[0] @ mount.rotation, at[0], (at[2, :2] - at[1, :2]) / 0.02

    def _echoes(self, t_s: float, origin: F64) -> _Echoes:
        state, rate = self.scene.tracks.at(t_s)
        x, y, yaw = state[self.owner].T
        c, s = np.cos(yaw), np.sin(yaw)
        moving = np.stack(
            [x + c * self.spot[:, 0] - s * self.spot[:, 1], y + s * self.spot[:, 0] + c * self.spot[:, 1]], axis=1
        )
        arm = moving - state[self.owner, :2]
        turn = rate[self.owner, 2:3] * np.stack([-arm[:, 1], arm[:, 0]], axis=1)
        sight = moving - origin[:2]
        aspect = np.abs(np.cos(np.arctan2(sight[:, 1], sight[:, 0]) - yaw))
        # Cars are bright from the front, the back and broadside, dim at the corners.
        rcs = self.rcs + 5.0 * (np.maximum(aspect, np.sqrt(1.0 - aspect**2)) - 0.85) / 0.15
        velocity = rate[self.owner, :2] + turn
        merge = np.where(np.hypot(*velocity.T) > 0.5, _MERGE_MOVING_M, _MERGE_STILL_M)
        told = self.told / (1.0 + (np.hypot(*sight.T) / merge) ** 2)
        return _Echoes(
            xy_m=np.concatenate([moving, self.still_xy]),
            velocity_mps=np.concatenate([velocity, np.zeros_like(self.still_xy)]),
            rcs_dbsm=np.concatenate([rcs, self.still_rcs]),
            told=np.concatenate([told, np.ones(len(self.still_xy))]),
            owner=np.concatenate([self.owner, np.full(len(self.still_xy), -1)]),
        )

    def _open(
        self, echoes: _Echoes, keep: NDArray[np.int64], origin: F64, relative: F64, things: Primitives, tree: raycast.Tree,
        rng: np.random.Generator,
    ) -> NDArray[np.bool_]:  # fmt: skip
        """Which candidates are not hidden; radar often sees under and around what stands in the way."""
        if not len(keep):
            return np.zeros(0, np.bool_)
        to = np.column_stack([echoes.xy_m[keep] - origin[:2], np.full(len(keep), 0.1)])
        far = np.linalg.norm(to, axis=1)
        start = np.repeat(origin[None], len(keep), axis=0)
        distance, _ = raycast.first_hits(things.prims, things.kinds, *tree, start, to / far[:, None], FAR_M)
        return np.asarray((distance > far - 1.5) | (rng.random(len(keep)) < 0.35))


def _standing_scatterers(scene: Scene, rng: np.random.Generator) -> tuple[F64, F64]:
    """Places and cross-sections of everything that stands: walls, poles, rails, trees, ground clutter."""
    spots: list[F64] = []
    rcs: list[F64] = []
    for p, kind in zip(scene.statics.prims, scene.statics.kinds, strict=True):
        if p[2] - p[5] > 2.0 and kind[0] != raycast.ELLIPSOID:
            continue  # out of the flat beam
        length = max(p[3], p[4])
        count = max(1, int(length / 1.1))
        along = rng.uniform(-1, 1, (count, 2))
        if kind[0] == raycast.BOX and length > 1.5:
            side = rng.random(count) < 0.7
            along[side, 1] = np.sign(along[side, 1])
            along[~side, 0] = np.sign(along[~side, 0])
        lx, ly = along[:, 0] * p[3], along[:, 1] * p[4]
        spots.append(np.stack([p[0] + p[6] * lx - p[7] * ly, p[1] + p[7] * lx + p[6] * ly], axis=1))
        mean = 3.0 if p[10] > 0 else (10.0 if length > 3.0 else 7.0)
        rcs.append(mean + 6.5 * rng.standard_normal(count))
    run = scene.road.length_m + scene.road.s_min_m
    clutter = int(run * 7.0)
    s = rng.uniform(scene.road.s_min_m + 5.0, run - 5.0, clutter)
    x, y, _ = scene.road.pose(s, rng.normal(0.0, 1.0, clutter) * np.where(rng.random(clutter) < 0.5, 12.0, 40.0))
    spots.append(np.stack([x, y], axis=1))
    rcs.append(rng.normal(3.0, 6.0, clutter))
    return np.concatenate(spots), np.concatenate(rcs)


def _seen(relative: F64, rcs: F64, told: F64, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of candidates inside the beams that stand out of the noise this time."""
    far = np.hypot(relative[:, 0], relative[:, 1])
    angle = np.abs(np.arctan2(relative[:, 1], relative[:, 0]))
    near_beam = (far < NEAR_M) & (angle < NEAR_HALF_RAD)
    far_beam = (far < FAR_M) & (angle < FAR_HALF_RAD)
    index = np.flatnonzero((near_beam | far_beam) & (far > 1.0))
    narrow, far = far_beam[index], far[index]
    reach = np.where(narrow, 110.0, 100.0 * np.cos(angle[index]) ** 2)
    # Beyond some distance the echo by way of the road cancels the direct one: power falls with the eighth power of range.
    snr_db = rcs[index] + 2.0 - 40.0 * np.log10(far / reach) - 40.0 * np.log10(np.maximum(far / TWO_RAY_M, 1.0))
    chance = told[index] * np.where(narrow, 0.92, 0.6) / (1.0 + np.exp(-snr_db / 3.0))
    return np.asarray(index[rng.random(len(index)) < chance])


def _points(xy: F64, velocity: F64, rcs: F64, moves: NDArray[np.bool_], own: F64, rng: np.random.Generator) -> NDArray[np.void]:
    """Measured positions, velocities and states of one scan; ghosts are added; at most ``MAX_POINTS``, about nearest first."""
    ghosts = rng.poisson(0.07 * len(xy) + 0.5)
    if len(xy) and ghosts:  # mirrored by a wall: farther away on nearly the same bearing
        pick = rng.integers(0, len(xy), ghosts)
        stretch = rng.uniform(1.1, 1.9, (ghosts, 1))
        xy, velocity = np.concatenate([xy, xy[pick] * stretch]), np.concatenate([velocity, velocity[pick]])
        rcs = np.concatenate([rcs, rcs[pick] - 3.0])
        moves = np.concatenate([moves, moves[pick]])
    ghost = np.arange(len(xy)) >= len(xy) - (ghosts if len(xy) else 0)
    far = np.hypot(xy[:, 0], xy[:, 1])
    xy = xy + rng.normal(0.0, 0.06, xy.shape) + (xy[:, ::-1] * (-1.0, 1.0)) * rng.normal(0.0, 0.003, (len(xy), 1))
    kept = rng.permutation(len(far))[:MAX_POINTS]  # the sensor reports no more
    order = kept[np.argsort(far[kept] + rng.normal(0.0, 1.0, len(kept)), kind="stable")]
    xy, velocity, rcs, moves, ghost = xy[order], velocity[order], rcs[order], moves[order], ghost[order]
    x, y = np.round(xy[:, 0] / 0.2) * 0.2, (np.floor(xy[:, 1] / 0.2) + 0.5) * 0.2
    line = np.stack([x, y], axis=1) / np.maximum(np.hypot(x, y), 0.1)[:, None]
    radial = (velocity * line).sum(axis=1) + rng.normal(0.0, 0.14, len(x)) * np.where(rng.random(len(x)) < 0.2, 3.2, 1.0)
    unknown = ghost & (rng.random(len(x)) < 0.75)  # the sensor gave no velocity: raw is zero and everything seems to move
    guess = np.where(moves[:, None], radial[:, None] * line, (radial * rng.uniform(0.3, 1.0, len(x)))[:, None] * line)
    raw = np.where(unknown[:, None], 0.0, np.round((guess - own) / 0.25) * 0.25)
    comp = ((raw + own) * line).sum(axis=1)[:, None] * line
    out = np.zeros(len(x), POINT)
    out["x"], out["y"], out["id"] = x, y, np.arange(len(x))
    out["rcs"] = np.clip(np.round(rcs * 2) / 2, -5.0, 64.0)
    out["vx"], out["vy"], out["vx_comp"], out["vy_comp"] = raw[:, 0], raw[:, 1], comp[:, 0], comp[:, 1]
    _states(out, moves, ghost, unknown, radial, rng)
    return out


def _states(
    out: NDArray[np.void], moves: NDArray[np.bool_], ghost: NDArray[np.bool_], unknown: NDArray[np.bool_], radial: F64,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """dyn_prop, ambiguity, invalid, false-alarm class and error indices, with the shares of genuine scans."""
    count = len(out)
    crossing = moves & (np.abs(radial) < 0.5)
    dyn = np.where(moves, np.where(radial < 0, 2, 0), np.where(rng.random(count) < 0.34, 3, 1))
    dyn = np.where(crossing, np.where(rng.random(count) < 0.3, 6, 1), dyn)
    dyn = np.where(rng.random(count) < 0.002, 7, dyn)
    out["dyn_prop"] = np.where(unknown, 4, dyn)
    dubious = (rng.random(count) < 0.42) | ghost
    state = rng.choice(_INVALID_GHOST, count, p=_INVALID_SHARE / _INVALID_SHARE.sum())
    out["invalid_state"] = np.where(unknown, 7, np.where(dubious, state, 0))
    out["ambig_state"] = np.where(unknown, 0, np.where(rng.random(count) < 0.02, rng.choice([0, 1, 1, 2], count), 3))
    out["pdh0"] = np.where(unknown, 6, np.where(dubious & (rng.random(count) < 0.85), 3, 1))
    out["is_quality_valid"] = 1
    spread = rng.random((4, count))
    out["x_rms"] = np.where(unknown, 0, 19 + np.searchsorted([0.64, 0.9, 0.99], spread[0]))
    out["y_rms"] = np.where(unknown, 0, 19 + np.searchsorted([0.5, 0.78, 0.91, 0.98], spread[1]))
    out["vx_rms"] = np.where(unknown, 0, 16 + np.searchsorted([0.77, 0.94, 0.985], spread[2]))
    out["vy_rms"] = np.where(unknown, 0, 3)


def encode_pcd(points: NDArray[np.void]) -> bytes:
    """A scan as nuScenes stores it: text header, 43 bytes a point, zero padding (the official reader needs some)."""
    header = (
        "# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\n"
        f"FIELDS {' '.join(FIELDS)}\nSIZE {' '.join(map(str, _SIZES))}\nTYPE {' '.join(_TYPES)}\n"
        f"COUNT {' '.join('1' * len(FIELDS))}\nWIDTH {len(points)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\n"
        f"POINTS {len(points)}\nDATA binary\n"
    )
    return header.encode() + points.tobytes() + bytes(PADDING_BYTES)
