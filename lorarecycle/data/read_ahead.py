"""Images of a list decoded and resized by threads, a few ahead of who asks for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from .images import ImageInput, to_uint8


def read_ahead(
    images: Sequence[ImageInput], size: int, *, workers: int, name: str = "images", ahead: int = 4
) -> Iterator[Tensor]:
    """`to_uint8` of each entry, in order; the first entry that cannot be read raises when its turn comes.

    Pillow and torch decode and resize without Python's lock, so threads suffice.

    Args:
        images: paths or other images, one or many an entry.
        size: side of the result in pixels.
        workers: threads.
        name: what error messages call `images`.
        ahead: entries per thread that are read before they are asked for; bounds the memory.

    Yields:
        uint8 [b, 3, size, size], b images of an entry.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="read-ahead") as pool:
        waiting: deque[Future[Tensor]] = deque()
        try:
            for i, image in enumerate(images):
                waiting.append(pool.submit(to_uint8, image, size, name=f"{name}[{i}]"))
                if len(waiting) > workers * ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # an error, or nobody asks any more
            for future in waiting:
                future.cancel()
