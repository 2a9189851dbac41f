"""A validation split made of a share of the training images, where a data set has none.

The name of an image decides: the division depends on neither the seed, nor the order of the images,
nor the format of the annotations. Nothing is written; both splits read the same packed images.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from dn_detr_jax.data.records import Example, RandomAccess
from dn_detr_jax.errors import DataError


def divide(file_names: Sequence[str], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Divides images into those to train on and those to evaluate on.

    Args:
      file_names: of the images.
      share: of the images to evaluate on, above 0 and below 1.

    Returns:
      Ascending positions of both, int64; none is empty.

    Raises:
      DataError: there are not two images.

    Examples:
      >>> [part.tolist() for part in divide(["a.jpg", "b.jpg", "c.jpg", "d.jpg"], 0.25)]
      [[1, 2, 3], [0]]
    """
    count = len(file_names)
    if count < 2:
        raise DataError(f"data.prepare_split is {share}, but there are {count} images to divide")
    # Folders differ between formats. Equal names of several folders go by their position.
    last = [name.rpartition("/")[2] for name in file_names]
    digests = [hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest() for name in last]
    order = sorted(range(count), key=lambda position: (digests[position], position))
    held_out = min(max(round(share * count), 1), count - 1)
    validation, train = order[:held_out], order[held_out:]
    return np.array(sorted(train), np.int64), np.array(sorted(validation), np.int64)


@dataclasses.dataclass(frozen=True)
class Part:
    """Some examples of a source; can be pickled if the source can.

    Attributes:
      source: of the examples.
      positions: int64 [N], of those that belong to the part.
    """

    source: RandomAccess[Example]
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, position: int) -> Example:
        if not 0 <= position < len(self):
            raise IndexError(f"index {position} of a split of {len(self)} images")
        return self.source[int(self.positions[position])]
