"""What turns images into features: the published Inception, or the classifier of the data set."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stabletrain.data.spec import Images


class Extractor(Protocol):
    """A network with features and logits. Scores carry its `name`, records its `sha256` and `resize`."""

    @property
    def name(self) -> str:
        """`inception2015` for the published weights and no others; else what it is."""

    @property
    def sha256(self) -> str:
        """Of the weights file."""

    @property
    def resize(self) -> str:
        """How images are brought to the network's size; `none` where they are not."""

    def features(self, images: Images) -> NDArray[np.float32]:
        """uint8 [B, H, W, C] -> [B, D]."""

    def logits(self, images: Images) -> NDArray[np.float32]:
        """uint8 [B, H, W, C] -> [B, K]."""

    def outputs(self, images: Images) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(features, logits) for the price of one."""
