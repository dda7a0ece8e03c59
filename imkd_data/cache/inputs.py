"""What a shard was made of: the input manifest of every sample, its hash, and the sizes it promises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from imkd_data.cache import keys
from imkd_data.errors import InputDataError, SourceMissingError
from imkd_data.sample import Reader, Sample

__all__ = ["SampleInputs", "check_inputs", "sample_inputs"]


@dataclass(frozen=True, slots=True)
class SampleInputs:
    """Hash of one sample's manifest for some needs, promised file sizes, and the error where a file is missing."""

    hash: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    missing: SourceMissingError | None = None


def sample_inputs(reader: Reader, sample: Sample, needs: Iterable[str]) -> SampleInputs:
    """The manifest of one sample. A missing file becomes part of the hash, so that its return rebuilds the shard."""
    try:
        manifest = reader.input_manifest(sample, frozenset(needs))
    except SourceMissingError as error:
        return SampleInputs(keys.hash_of(["missing", error.details.get("file", "")]), missing=error)
    sizes = {e[0]: e[1] for e in manifest if len(e) == 2 and isinstance(e[1], int)}
    return SampleInputs(keys.hash_of(manifest), sizes)


def check_inputs(
    reader: Reader, samples: Sequence[Sample], inputs: Mapping[str, str], needs_of: Mapping[str, tuple[str, ...]]
) -> dict[str, int]:
    """Compare what is there now with the plan's hashes (field -> hash over the shard); returns promised sizes by path.

    Raises InputDataError "source changed" with the fields that differ.
    """
    sizes: dict[str, int] = {}
    found: dict[tuple[str, ...], str] = {}
    for needs in {tuple(sorted(needs_of[name])) for name in inputs}:
        rows = [sample_inputs(reader, s, needs) for s in samples]
        found[needs] = keys.hash_of([r.hash for r in rows])
        for row in rows:
            sizes.update(row.sizes)
    changed = [n for n, promised in inputs.items() if found[tuple(sorted(needs_of[n]))] != promised]
    if changed:
        raise InputDataError(
            "the source changed between plan and build: files or tables differ",
            rule="source.changed",
            field=", ".join(sorted(changed)),
            next="wait until nothing writes to the data set, then run the same command; it plans again",
        )
    return sizes
