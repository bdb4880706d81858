"""Images of meta-training steps, read from disk ahead of the steps that want them."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from ..inversion.stored import StoredImages

AHEAD = 3
"""Steps whose images are read before they are wanted."""


class ImageStream:
    """A buffer on the device that holds the images of one step; `advance` brings those of the next.

    A thread reads ahead, into pinned memory for a GPU, so that copies run beside the step before. The first `advance`
    waits until all that is read ahead is there: pinning memory would break a CUDA graph that the first step captures.

    Args:
        images: all of them, on disk.
        rows: int64 [steps, k], the images of each step, on the CPU.
        first: step to begin with.
        device: where the buffer is.
    """

    def __init__(self, images: StoredImages, rows: Tensor, first: int, device: torch.device) -> None:
        self._images, self._rows, self._next, self._device = images, rows, first, device
        self._ahead: deque[Future[Tensor]] = deque()
        self._begun = False
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="images")
        self.window: Tensor = torch.empty(rows.shape[1], *images.shape[1:], dtype=torch.uint8, device=device)
        """uint8 [k, 3, H, W], of the step to be taken; it stays where it is"""

    def advance(self) -> None:
        """Fill the buffer with the next step's images.

        Raises:
            OSError: a file cannot be read.
        """
        while len(self._ahead) < AHEAD and self._next < len(self._rows):
            self._ahead.append(self._reader.submit(self._read, self._next))
            self._next += 1
        if not self._begun:
            wait(self._ahead)
            self._begun = True
        self.window.copy_(self._ahead.popleft().result(), non_blocking=True)

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> Tensor:
        found = self._images.read(self._rows[step])
        return found.pin_memory() if self._device.type == "cuda" else found
