"""Configurations of the networks: frozen values with a JSON form. Unknown keys are errors that name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

from imkd_data.classes import CLASS_GROUPS
from imkd_data.errors import RecipeError
from imkd_data.geometry import BevGrid

__all__ = [
    "CRN_PARITY",
    "FusionConfig",
    "LabelConfig",
    "LidarConfig",
    "ModelConfig",
    "StudentConfig",
]

NUSCENES_LIDAR_M = (0.943713, 0.0, 1.84023)  # LIDAR_TOP in ego
MODEL_GRID = BevGrid(x_min_m=-51.2, y_min_m=-51.2, cell_m=0.8, nx=128, ny=128)
FUSERS = ("concat", "gated", "deformable", "intensity", "heterogeneous", "none")
SIM_FUSERS = ("concat", "gated", "heterogeneous")  # those that read the simulated branch, where there is one

# Named departures of the public CRN code that live in the network (crn: section 8). Data options are the loader's.
CRN_PARITY = frozenset(
    {
        "pool_grad:uncounted",
        "cell_index:trunc",
        "image_channels:swapped",
        "frustum:linspace_edges",
        "geometry:top_row_half",
        "radar_cull:image_rows",
        "radar_empty:dummy",
        "pillar_features:legacy",
        "radar_caps:crn",
        "nan_velocity:zero",
    }
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Common part. grid: grid of the head maps; a batch on another grid is refused."""

    kind: ClassVar[str] = ""
    name: str
    grid: BevGrid = MODEL_GRID
    groups: tuple[tuple[str, ...], ...] = CLASS_GROUPS

    def as_dict(self) -> dict[str, Any]:
        """JSON form, with ``kind``."""
        out = {k: _plain(v) for k, v in asdict(self).items()}
        return {"kind": self.kind, **out, "grid": self.grid.as_dict()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ModelConfig:
        """From the JSON form; an unknown or missing key is a RecipeError naming it."""
        # Older checkpoints hold radar_drop; it is part of the loader's augmentation now and never worked at inference.
        value = {k: v for k, v in value.items() if k not in ("kind", "radar_drop")}
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(value) - known)
        if unknown:
            raise RecipeError(f"{cls.kind} model has unknown keys", expected=", ".join(sorted(known)), found=", ".join(unknown))
        values = {k: _tuples(v) for k, v in value.items()}
        try:
            if isinstance(value.get("grid"), Mapping):
                values["grid"] = BevGrid(**value["grid"])
            if "parity" in values:
                values["parity"] = frozenset(values["parity"])
            return cls(**values)
        except TypeError as error:
            raise RecipeError(f"{cls.kind} model cannot be read: {error}") from error

    def with_values(self, **changes: Any) -> ModelConfig:
        """A changed copy; unknown names are errors."""
        unknown = sorted(set(changes) - {f.name for f in fields(self)})
        if unknown:
            raise RecipeError(f"{self.kind} model has no setting {', '.join(unknown)}")
        return replace(self, **changes)


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class StudentConfig(ModelConfig):
    """Camera-radar student; the defaults are CRN with ResNet-50.

    history: keyframe offsets, newest first. backbone: a key of camera.BACKBONES; backbone_weights: see
    camera.build_backbone, None = random. depth_*: bins start at depth_min_m. radar_encoder: perspective (CRN, needs cameras) |
    bev (pillars on the BEV grid). geometry_rows: height of a frustum cell from the ``top`` or the ``mean`` valid feature
    row. fuser_stride: the attention fusers work on a grid coarser by this factor (1 in CRN; more is cheaper and blurs).
    image_neck: stages (SECONDFPN, all four maps side by side) | topdown (BEVFusion's, strides 8 to 32, output at 8).
    depth_net: plain (CRN) | camera_aware (BEVDepth) | linear (BEVFusion) | lidar_points (BEVFusion's with LiDAR; teachers
    only). view: collapsed (CRN: mean over cells that share one row's place) | frustum (every cell has its own place, sums).
    view_refine: a frustum view is pooled on cells this much finer and brought to the grid by convolutions. time_fusion:
    mix (one convolution) | concat (the trunk reads all keyframes). fuser none: the only branch's map as it is.
    source_hw_px: size of the data set's images. radar_encoder points: CRKD's point network on BEV cells. trunk: resnet (CRN) |
    bevfusion (three strided stages and a two-level neck). convention: bev | bevfusion, see convention.py; mount_m: where its
    LiDAR sits in ego. For fuser heterogeneous: sim_drop is the share of samples whose added evidence is zeroed in training,
    sim_gate_bias the start of the gate's bias (-2: about 0.12 open), sim_added what is added to the camera map: gated (the
    simulated map times the gate) | attended (deformable cross-attention with fuser_heads and fuser_points; it has no gate).
    """

    kind: ClassVar[str] = "student"
    history: tuple[int, ...] = (0, -2, -4, -6)
    camera: bool = True
    radar: bool = True
    # images
    image_hw_px: tuple[int, int] = (256, 704)
    backbone: str = "resnet50"
    backbone_weights: str | None = None
    fpn_channels: int = 128
    image_neck: str = "stages"
    stride_px: int = 16
    depth_min_m: float = 2.0
    depth_step_m: float = 0.8
    depth_bins: int = 70
    depth_channels: int = 256
    depth_blocks: int = 3
    camera_channels: int = 80
    view_convs: int = 3
    z_range_m: tuple[float, float] = (-5.0, 3.0)
    geometry_rows: str = "top"
    depth_input: bool = False  # LiDAR depth as input: teachers only
    depth_net: str = "plain"
    depth_aggregation: bool = False  # BEVDepth's "da" variants
    view: str = "collapsed"
    view_refine: int = 1
    source_hw_px: tuple[int, int] = (900, 1600)
    # radar
    radar_encoder: str = "perspective"
    radar_channels: int = 80
    pillar_channels: int = 64
    radar_widths: tuple[int, ...] = (64, 128, 256)
    radar_layers: tuple[int, ...] = (3, 5, 5)
    radar_neck_channels: int = 128
    radar_head_channels: int = 192
    radar_states: bool = False
    radar_points_per_cell: int = 0  # cap of imported networks; their padding enters the maximum
    norm_momentum: float = 0.01  # of mmdetection3d's parts (necks, radar encoder); short runs need 0.1
    calibration: bool = False
    calibration_init: str = "kaiming"
    # fusion
    fuser: str = "deformable"
    fused_channels: int = 128
    fuser_layers: int = 6
    fuser_heads: int = 4
    fuser_points: int = 4
    fuser_hidden: int = 256
    fuser_dropout: float = 0.1
    fuser_stride: int = 1
    time_fusion: str = "mix"
    gate_gain: float = 1.0
    camera_gate: str = "radar"
    sim_branch: bool = False
    sim_attention: str = "deformable"
    sim_drop: float = 0.0
    sim_gate_bias: float = -2.0
    sim_added: str = "gated"
    # trunk and head
    trunk: str = "resnet"
    trunk_base: int = 160
    trunk_blocks: tuple[int, ...] = (2, 2, 2)
    neck_channels: int = 64
    head_shared: int = 64
    head_branch: int = 64
    head_float32: bool = True
    # losses
    depth_weight: float = 3.0
    box_weight: float = 0.25
    velocity_weight: float = 1.0
    convention: str = "bev"
    mount_m: tuple[float, float, float] = NUSCENES_LIDAR_M
    parity: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parity", frozenset(self.parity))
        unknown = sorted(self.parity - CRN_PARITY)
        if unknown:
            raise RecipeError("unknown parity options", expected=", ".join(sorted(CRN_PARITY)), found=", ".join(unknown))
        if self.fuser not in FUSERS:
            raise RecipeError("fuser", expected=" | ".join(FUSERS), found=self.fuser)
        if not (self.camera or self.radar):
            raise RecipeError("a student needs a camera or a radar branch")
        if self.sim_branch and not self.camera:
            raise RecipeError("the simulated branch is made from images", next="set camera=true or sim_branch=false")
        if self.sim_branch and self.fuser in ("deformable", "intensity"):  # "none": see _check_lift
            raise RecipeError(
                "this fuser never reads the simulated branch",
                expected=" | ".join(SIM_FUSERS),
                found=self.fuser,
                next="choose such a fuser, or set sim_branch=false",
            )
        if self.fuser == "heterogeneous" and not self.sim_branch:
            raise RecipeError("the heterogeneous fuser needs the simulated branch", next="set sim_branch=true")
        if not self.history or self.history[0] != 0 or any(offset > 0 for offset in self.history):
            raise RecipeError("history starts with 0 and goes to the past", found=repr(self.history))
        self._check_sizes()
        self._check_lift()
        choices = {
            "radar_encoder": ("perspective", "bev", "points"),
            "trunk": ("resnet", "bevfusion"),
            "convention": ("bev", "bevfusion"),
            "geometry_rows": ("top", "mean"),
            "calibration_init": ("kaiming", "residual"),
            "camera_gate": ("radar", "camera"),
            "sim_attention": ("deformable", "conv"),
            "sim_added": ("gated", "attended"),
            "image_neck": ("stages", "topdown"),
            "depth_net": ("plain", "camera_aware", "linear", "lidar_points"),
            "view": ("collapsed", "frustum"),
            "time_fusion": ("mix", "concat"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise RecipeError(key, expected=" | ".join(allowed), found=getattr(self, key))

    @property
    def trunk_channels(self) -> int:
        """Channels of ``bev_fused`` after the fusion over time."""
        return self.fused_channels * (len(self.history) if self.time_fusion == "concat" else 1)

    @property
    def view_grid(self) -> BevGrid:
        """Cells on which the view is pooled."""
        g, k = self.grid, self.view_refine
        return BevGrid(x_min_m=g.x_min_m, y_min_m=g.y_min_m, cell_m=g.cell_mm / k / 1000, nx=g.nx * k, ny=g.ny * k)

    @property
    def assisted(self) -> bool:
        """Whether radar helps the view transform (CRN)."""
        return self.camera and self.radar and self.radar_encoder == "perspective"

    def _check_lift(self) -> None:
        if self.fuser == "none":
            if (self.camera and self.radar) or self.sim_branch:
                raise RecipeError("fuser none is for students of one branch", next="set radar=false or camera=false")
            width = self.camera_channels if self.camera else self.radar_channels
            if width != self.fused_channels:
                raise RecipeError("with fuser none fused_channels is the branch's width", expected=str(width))
        if self.convention != "bev" and (
            self.assisted or len(self.history) > 1 or self.grid.y_min_mm != -round(self.grid.y_max_m * 1000)
        ):
            raise RecipeError(
                "the convention of BEVFusion is for one keyframe, a grid symmetric in y, and radar on BEV cells",
                next="radar_encoder=points, history=0",
            )
        if self.view == "frustum" and (self.assisted or self.sim_branch):
            raise RecipeError(
                "the frustum view knows no radar in perspective and no simulated branch", next="set radar_encoder=bev"
            )
        if self.view == "collapsed" and (self.depth_net != "plain" or self.depth_aggregation):
            raise RecipeError("depth_net and depth_aggregation other than CRN's need view=frustum", found=self.depth_net)
        if self.view_refine != 1 and (self.view_refine < 1 or self.view != "frustum" or self.grid.cell_mm % self.view_refine):
            found = f"{self.view_refine} with view {self.view} and cells of {self.grid.cell_mm} mm"
            raise RecipeError("view_refine divides the cells of a frustum view into whole millimetres", found=found)
        if self.stride_px != 8 and (self.image_neck == "topdown" or self.depth_net == "lidar_points"):
            raise RecipeError("image_neck topdown and depth_net lidar_points work at stride_px 8", found=str(self.stride_px))

    def _check_sizes(self) -> None:
        """The strided maps must come back to their own size."""
        down = 2 ** (len(self.trunk_blocks) - (self.trunk == "bevfusion"))
        if self.grid.ny % down or self.grid.nx % down:
            raise RecipeError(f"grid counts must divide by {down}", found=f"{self.grid.ny}x{self.grid.nx}")
        height, width = self.image_hw_px
        if self.camera and (height % 32 or width % 32 or (self.assisted and self.depth_bins % 2)):
            raise RecipeError(
                "image sizes must divide by 32 and depth_bins by 2", found=f"{height}x{width}, {self.depth_bins} bins"
            )


@dataclass(frozen=True, kw_only=True)
class LidarConfig(ModelConfig):
    """LiDAR teacher. The defaults are the public CenterPoint pillar network (mmdetection3d, 0.2 m pillars).

    encoder: pillar | resnet34 | voxel. pillars_per_cell: pillars (voxels) along one head cell, even; resnet34 and voxel halve
    the grid three times down to it, so they take 8. widths, layers: stage0, stage1, stage2 (stage1 lies on the head grid).
    neck_stages: 3 = all (3 x neck_channels), 2 = stage1 and stage2 only (all that voxel has). intensity_scale multiplies
    reflectance 0..1 (255 for imported public networks). points_per_pillar: cap of the public code, 0 = none (with a cap its
    padding enters the maximum). scaled_inputs: point values of order one instead of metres (faster in short runs; public
    networks take metres). convention: bev | mmdet3d_lwh | mmdet3d_wlh, see convention.py. mount_m: where the sensor sits in
    ego. near_removed_m: points of past sweeps within this distance of the sensor in x and y are left out (1.0 in mmdetection3d;
    0 = none).
    """

    kind: ClassVar[str] = "lidar"
    encoder: str = "pillar"
    pillars_per_cell: int = 4
    pillar_channels: int = 64
    pillar_centre_values: int = 2  # offsets to the pillar centre: x, y (2) or x, y, z (3)
    points_per_pillar: int = 0
    scaled_inputs: bool = False
    norm_momentum: float = 0.01
    z_range_m: tuple[float, float] = (-5.0, 3.0)
    intensity_scale: float = 1.0
    widths: tuple[int, int, int] = (64, 128, 256)
    layers: tuple[int, int, int] = (3, 5, 5)
    neck_stages: int = 3
    neck_channels: int = 128
    head_shared: int = 64
    head_branch: int = 64
    head_float32: bool = False
    checkpoint_stages: bool = False
    box_weight: float = 0.25
    velocity_weight: float = 0.2
    convention: str = "bev"
    mount_m: tuple[float, float, float] = NUSCENES_LIDAR_M
    near_removed_m: float = 0.0

    def __post_init__(self) -> None:
        if self.encoder not in ("pillar", "resnet34", "voxel"):
            raise RecipeError("encoder", expected="pillar | resnet34 | voxel", found=self.encoder)
        if self.convention not in ("bev", "mmdet3d_lwh", "mmdet3d_wlh"):
            raise RecipeError("convention", expected="bev | mmdet3d_lwh | mmdet3d_wlh", found=self.convention)
        per_cell, halved = self.pillars_per_cell, self.encoder in ("resnet34", "voxel")
        fits = per_cell == 8 if halved else per_cell >= 2 and per_cell % 2 == 0
        if not fits:  # the stages would not lie on the head grid
            raise RecipeError(
                f"pillars_per_cell of encoder {self.encoder}",
                expected="8" if halved else "an even number of at least 2",
                found=str(per_cell),
            )
        if self.neck_stages not in (2, 3):
            raise RecipeError("neck_stages", expected="2 or 3", found=str(self.neck_stages))
        if self.grid.ny % 2 or self.grid.nx % 2:
            raise RecipeError("grid counts must divide by 2", found=f"{self.grid.ny}x{self.grid.nx}")


@dataclass(frozen=True, kw_only=True)
class LabelConfig(ModelConfig):
    """Label encoder (LabelDistill): one branch per stage that its teacher's neck reads.

    stages: (feature name, channels, ny, nx) as the teacher delivers them. shrink: drawn part of a box's length and width.
    teacher_sha256: hash of the LiDAR teacher's weights it was trained with ("" = not yet known).
    """

    kind: ClassVar[str] = "label"
    stages: tuple[tuple[str, int, int, int], ...]
    hidden: int = 256
    shrink: float = 0.5
    box_weight: float = 0.25
    velocity_weight: float = 0.2
    teacher_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class FusionConfig(ModelConfig):
    """LiDAR-camera teacher of CRKD and Adaptive-Smooth: ``lidar`` without its head, the camera branch of ``student``,
    a gated (or concat) fuser, and the student's kind of trunk and head. The parts are JSON objects of their configs.
    lidar_neck false: the map of a voxel encoder itself is ``bev_lidar``, without stages and neck (BEVFusion)."""

    kind: ClassVar[str] = "fusion"
    lidar: LidarConfig
    student: StudentConfig
    lidar_channels: int = 256
    lidar_neck: bool = True
    fused_channels: int = 256
    fuser: str = "gated"
    box_weight: float = 0.25
    velocity_weight: float = 0.2

    def __post_init__(self) -> None:
        for key, cls in (("lidar", LidarConfig), ("student", StudentConfig)):
            if isinstance(getattr(self, key), Mapping):
                object.__setattr__(self, key, cls.from_dict(getattr(self, key)))
        if self.fuser not in ("gated", "concat"):
            raise RecipeError("fuser of a LiDAR-camera teacher", expected="gated | concat", found=self.fuser)
        if not self.lidar_neck and (self.lidar.encoder != "voxel" or self.lidar_channels != 256):
            raise RecipeError("lidar_neck=false needs encoder=voxel and its lidar_channels=256", found=self.lidar.encoder)
        if self.lidar.grid != self.grid or self.student.grid != self.grid:
            raise RecipeError("the branches of a LiDAR-camera teacher lie on its own grid", found=repr(self.student.grid))

    def as_dict(self) -> dict[str, Any]:
        """JSON form, the branches nested."""
        own = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        parts = {"grid": self.grid.as_dict(), "lidar": self.lidar.as_dict(), "student": self.student.as_dict()}
        return {"kind": self.kind, **own, **parts}
