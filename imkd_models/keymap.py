"""Names of public weights: rules from our keys to theirs, and safe reading of their files.

A rule is (our key pattern, their key template, change of the tensor). In templates ``+g`` adds one to the number in group g and
``*g+h`` is 3 g + h.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from imkd_data.errors import InputDataError

__all__ = ["Rule", "public_key", "read_public", "resnet_rules"]

Rule = tuple[str, str, str]


def resnet_rules(ours: str, theirs: str) -> list[Rule]:
    """transformers' ResNet from torchvision's and mmdetection's names."""
    block = rf"{ours}\.encoder\.stages\.(\d+)\.layers\.(\d+)"
    return [
        (rf"{ours}\.embedder\.embedder\.convolution\.(.*)", rf"{theirs}.conv1.\1", ""),
        (rf"{ours}\.embedder\.embedder\.normalization\.(.*)", rf"{theirs}.bn1.\1", ""),
        (rf"{block}\.shortcut\.convolution\.(.*)", rf"{theirs}.layer+\1.\2.downsample.0.\3", ""),
        (rf"{block}\.shortcut\.normalization\.(.*)", rf"{theirs}.layer+\1.\2.downsample.1.\3", ""),
        (rf"{block}\.layer\.(\d+)\.convolution\.(.*)", rf"{theirs}.layer+\1.\2.conv+\3.\4", ""),
        (rf"{block}\.layer\.(\d+)\.normalization\.(.*)", rf"{theirs}.layer+\1.\2.bn+\3.\4", ""),
    ]


def public_key(rules: list[Rule], key: str) -> tuple[str, str]:
    """Their name and the change for one of our keys. In templates ``+g`` adds one to group g, ``*g+h`` is 3 g + h."""
    for pattern, template, change in rules:
        found = re.fullmatch(pattern, key)
        if found is not None:
            return _filled(template, found), change
    raise KeyError(key)


def _filled(template: str, found: re.Match[str]) -> str:
    def tripled(m: re.Match[str]) -> str:
        return str(3 * int(found[int(m[1])]) + int(found[int(m[2])]))

    def plus_one(m: re.Match[str]) -> str:
        return str(int(found[int(m[1])]) + 1)

    text = re.sub(r"\*\\(\d)\+\\(\d)", tripled, template)
    return found.expand(re.sub(r"\+\\(\d)", plus_one, text))


def _seen(file: Path, error: Exception) -> str:
    """What is in the way. torch's own words advise to execute what is in the file, so they are not passed on."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return f"GLOBAL {named[1]}, which is no tensor"
    if isinstance(error, RuntimeError) and "zip archive" in str(error):
        return str(error).partition(". ")[0]
    with file.open("rb") as opened:
        return f"a file of {file.stat().st_size:,} bytes that begins with {opened.read(16)!r}"


def read_public(file: Path) -> dict[str, Tensor]:
    """The state dict in a public file, read without executing anything in it."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputDataError("no such weights file", file=str(file)) from error
    except Exception as error:
        raise InputDataError(
            "the file cannot be read as plain weights",
            file=str(file),
            found=_seen(file, error),
            next="keep only its state_dict: torch.save({'state_dict': ...}) in the environment that wrote it",
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputDataError("the file holds no state dict", file=str(file), expected="{'state_dict': {name: tensor}}")
    return dict(state)
