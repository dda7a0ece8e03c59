"""The torch Dataset of a view. Apart, because views themselves need no torch; a class of its own, so that workers started by
spawn can open it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from imkd_data.views.base import View

__all__ = ["ViewDataset"]


class ViewDataset(Dataset):  # type: ignore[misc]
    """Map-style: ``view.sample`` of ``rows``. NumPy arrays and lists of any length, so a collate function of the model's own is
    needed."""

    def __init__(self, view: View, rows: NDArray[np.int64]) -> None:
        self.view, self.rows = view, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.view.sample(int(self.rows[index]))
