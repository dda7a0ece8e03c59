"""Receipts and other JSON files of a cache: canonical bytes that name their own checksum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from imkd_data.cache.commit import crc32c_hex, sha256_hex, storage_error
from imkd_data.errors import CacheDamageError, MismatchError
from imkd_data.recipe import canonical_json

__all__ = ["FORMAT", "parse_json", "read_bytes", "read_json", "read_receipt", "sealed", "unsealed"]

FORMAT = 1
_MAX_JSON = 256 << 20


def read_bytes(path: Path) -> bytes:
    """The file's bytes. A missing file is CacheDamageError, other system errors are StorageError."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CacheDamageError("file is missing", rule="file.missing", file=str(path), next="imkd-data repair") from error
    except OSError as error:
        raise storage_error(error, path) from error


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not allowed")


def parse_json(data: bytes, path: Path, *, canonical: bool = True) -> Any:
    """Parse JSON; with ``canonical`` any byte that differs from the one form is damage."""
    try:
        if len(data) > _MAX_JSON:
            raise ValueError(f"{len(data):,} bytes are too many")
        value = json.loads(data, parse_constant=_refuse_constant)
        same = not canonical or canonical_json(value) == data
    except (ValueError, RecursionError) as error:
        raise CacheDamageError(
            "JSON cannot be read", rule="json", file=str(path), found=str(error), next="imkd-data repair"
        ) from error
    if not same:
        raise CacheDamageError("JSON differs from its canonical form", rule="json", file=str(path), next="imkd-data repair")
    return value


def read_json(path: Path) -> Any:
    """Read a canonical JSON file."""
    return parse_json(read_bytes(path), path)


def sealed(body: dict[str, Any], seal: str) -> bytes:
    """Canonical bytes of ``body`` with its own checksum under ``seal`` (self_crc32c or self_sha256)."""
    digest = crc32c_hex if seal.endswith("crc32c") else sha256_hex
    return canonical_json({**body, seal: digest(canonical_json(body))})


def unsealed(value: Any, seal: str, path: Path) -> dict[str, Any]:
    """The body without its seal; a wrong seal is damage, another format is a mismatch."""
    digest = crc32c_hex if seal.endswith("crc32c") else sha256_hex
    if not isinstance(value, dict) or seal not in value:
        raise CacheDamageError("file has no checksum of its own", rule="seal", file=str(path), next="imkd-data repair")
    if isinstance(value.get("format"), int) and value["format"] > FORMAT:
        raise MismatchError(
            "the cache was written by a newer version",
            rule="format",
            file=str(path),
            expected=f"format {FORMAT}",
            found=f"format {value['format']}",
            next="pip install --upgrade imkd",
        )
    body = {k: v for k, v in value.items() if k != seal}
    if value[seal] != digest(canonical_json(body)):
        raise CacheDamageError("content differs from its own checksum", rule="seal", file=str(path), next="imkd-data repair")
    if (
        type(body.get("format")) is not int or body["format"] != FORMAT
    ):  # 1 is the first: a whole file with any other number is not one of ours
        raise MismatchError(
            "unknown cache format", rule="format", file=str(path), expected=f"format {FORMAT}", found=str(body.get("format"))
        )
    return body


def read_receipt(path: Path) -> dict[str, Any]:
    """A receipt's body, checked."""
    body = unsealed(read_json(path), "self_crc32c", path)
    needed = {"field", "shard", "key", "tokens", "path", "bytes", "crc32c", "sha256", "row_crc32c", "members", "inputs"}
    if not needed <= set(body):
        raise CacheDamageError(
            "receipt lacks entries", rule="receipt", file=str(path), found=", ".join(sorted(needed - set(body)))
        )
    return body
