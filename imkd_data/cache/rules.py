"""What ``verify`` looks for in files, and how a finding is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["RULES", "Problem"]

# id -> (sentence, severity). ``note`` never fails a check.
RULES: dict[str, tuple[str, str]] = {
    "manifest.missing": ("A complete cache has a manifest.", "error"),
    "manifest.damaged": ("The manifest equals its own sha256 and its canonical form.", "error"),
    "recipe.damaged": ("recipe.json is canonical, known, and as hashed in the manifest.", "error"),
    "group.damaged": ("arrays.zarr/zarr.json is canonical and as hashed in the manifest.", "error"),
    "array.damaged": ("Every array's zarr.json is canonical and as hashed in the manifest.", "error"),
    "notice.damaged": ("NOTICE is as hashed in the manifest.", "error"),
    "index.damaged": ("index.parquet is as hashed in the manifest and readable.", "error"),
    "index.rows": ("The index lists exactly the samples of the shard table, in order.", "error"),
    "index.checksums": ("Row checksums in the index equal those in the receipts.", "error"),
    "index.counts": ("Counts per split in the manifest equal the index.", "error"),
    "split.twice": ("No scene lies in two splits.", "error"),
    "receipt.missing": ("Every field and shard has a receipt.", "error"),
    "receipt.damaged": ("Every receipt equals its own crc32c, its canonical form and its hash in the manifest.", "error"),
    "receipt.foreign": ("A receipt speaks of its own field, shard, file and tokens.", "error"),
    "receipt.key": ("The key of a receipt equals the manifest's.", "error"),
    "data.missing": ("Every receipt's data file is there.", "error"),
    "data.size": ("Every data file has the size of its receipt.", "error"),
    "data.crc32c": ("Every data file has the crc32c of its receipt.", "error"),
    "data.sha256": ("Every data file has the sha256 of its receipt.", "error"),
    "shard.index": ("The index of a Zarr shard is whole and points inside the file.", "error"),
    "shard.rows": ("A Zarr shard holds exactly the rows of its receipt.", "error"),
    "row.crc32c": ("Every row's bytes have the checksum of the receipt.", "error"),
    "tar.members": ("A tar holds exactly the members of its receipt, named by token and part.", "error"),
    "quarantined": ("Samples without data of some field are listed.", "warning"),
    "file.foreign": ("Files that are not ours are left alone.", "note"),
    "file.partial": ("Temp files of dead builds are left alone; repair --clean-temp removes them.", "note"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One finding. ``severity``: error (exit 4), warning, note."""

    rule: str
    what: str
    severity: str = "error"
    file: str = ""
    field: str = ""
    shard: int = -1
    token: str = ""
    expected: str = ""
    found: str = ""

    def as_json(self) -> dict[str, Any]:
        """JSON form without empty entries."""
        out = {
            n: getattr(self, n) for n in ("rule", "severity", "what", "file", "field", "shard", "token", "expected", "found")
        }
        return {k: v for k, v in out.items() if v not in ("", -1)}
