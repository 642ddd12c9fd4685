"""In which order a pass visits the images, and reading ahead of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pyro_cryo.data.pixels import Pixels

SHUFFLED_WHOLE_BYTES = 2 << 30
BUFFER_BYTES = 128 << 20
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Order:
    """One pass. rows: (N,) long; buffer: so many rows are read at once, a multiple of the batch."""

    rows: Tensor
    batch: int
    buffer: int

    @staticmethod
    def of(count: int, image_bytes: int, batch: int, generator: torch.Generator | None) -> Order:
        """All rows in order, or shuffled where there is a generator.

        A set of up to 2 GiB is permuted as a whole. Of a larger one, blocks of neighbours (1 MiB) are permuted, then
        the rows within buffers of 128 MiB: a buffer is read in the order of the disk, a block at a time.
        """
        if generator is None:
            return Order(torch.arange(count), batch, batch)
        if count * image_bytes <= SHUFFLED_WHOLE_BYTES:
            return Order(torch.randperm(count, generator=generator), batch, batch)
        block = max(1, BLOCK_BYTES // image_bytes)
        buffer = batch * max(1, BUFFER_BYTES // (image_bytes * batch))
        blocks = torch.randperm(-(-count // block), generator=generator)
        rows = (blocks[:, None] * block + torch.arange(block)).flatten()
        rows = rows[rows < count]
        key = torch.arange(count) // buffer + torch.rand(count, generator=generator, dtype=torch.float64)
        return Order(rows[torch.argsort(key)], batch, buffer)

    def batches(self, read: Callable[[Tensor], Pixels], start: int) -> Iterator[tuple[Tensor, Pixels]]:
        """Rows and pixels of each batch from number `start`; one thread reads the next buffer meanwhile."""
        first = start * self.batch
        edges = [first, *range(first - first % self.buffer + self.buffer, len(self.rows), self.buffer), len(self.rows)]
        spans = [(a, b) for a, b in pairwise(edges) if a < b]
        if not spans:
            return
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
            ahead = reader.submit(read, self.rows[slice(*spans[0])])
            for number, (a, b) in enumerate(spans):
                pixels = ahead.result()
                if number + 1 < len(spans):
                    ahead = reader.submit(read, self.rows[slice(*spans[number + 1])])
                for i in range(a, b, self.batch):
                    j = min(i + self.batch, b)
                    yield self.rows[i:j], pixels if (i, j) == (a, b) else pixels[i - a : j - a]
                del pixels
