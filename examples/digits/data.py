"""The digits of scikit-learn: 1797 grey images of 8x8 pixels, in the package, so no network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TEST_IMAGES = 450
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """One fixed, stratified split; the pixels are standardised with the training set's moments.

    Attributes:
        train_x: Training images, ``(1347, 1, 8, 8)`` float32.
        train_y: Training labels, ``(1347,)`` int64.
        test_x: Test images, ``(450, 1, 8, 8)`` float32.
        test_y: Test labels, ``(450,)`` int64.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load() -> Digits:
    """Load the digits; the split is the same whatever the demo's seed.

    Returns:
        The training and test images with their labels.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, labels, test_size=TEST_IMAGES, stratify=labels, random_state=_SPLIT_SEED
    )
    mean, std = float(train_x.mean()), float(train_x.std())

    def images(array: object) -> Tensor:
        standardised = (torch.as_tensor(array, dtype=torch.float64) - mean) / std
        return standardised.to(torch.float32).reshape(-1, 1, 8, 8)

    def classes(array: object) -> Tensor:
        return torch.as_tensor(array, dtype=torch.int64)

    return Digits(images(train_x), classes(train_y), images(test_x), classes(test_y))
