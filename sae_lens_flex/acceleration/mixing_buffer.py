"""SAELens's mixing buffer, in memory that is allocated once."""

from collections.abc import Iterator

import torch


@torch.no_grad()
def mixing_buffer(
    buffer_size: int,
    batch_size: int,
    activations_loader: Iterator[torch.Tensor],
    mix_fraction: float = 0.5,
) -> Iterator[torch.Tensor]:
    """
    Yield the batches that SAELens's `mixing_buffer` yields.

    SAELens's copies the whole buffer for every tensor that the loader yields, and again to shuffle
    it. This one copies every activation once into the buffer and once out of it, into a batch. What
    it yields is never overwritten.

    On a CPU the numbers of a permutation come from PyTorch's generator, as SAELens's do, and the
    batches are SAELens's bit for bit. On a GPU a buffer has a generator of its own, which
    `torch.manual_seed` decides, too. There the batches are other draws from the same distribution,
    because nothing else differs.

    Args:
        buffer_size: activations from which batches are drawn.
        batch_size: activations in a batch.
        activations_loader: yields tensors [n, ...], of any n.
        mix_fraction: the share of the buffer that stays for the next shuffle. With 0 nothing is
            shuffled.

    Raises:
        ValueError: for a batch larger than the buffer, a `mix_fraction` outside [0, 1], or
            activations of another width or on another device than those before.
    """
    if buffer_size < batch_size:
        raise ValueError(
            f"buffer_size is {buffer_size}. Buffer size must be greater than or equal to batch "
            f"size, {batch_size}"
        )
    if not 0 <= mix_fraction <= 1:
        raise ValueError(f"mix_fraction is {mix_fraction}. mix_fraction must be in [0, 1]")
    n_to_keep = int(buffer_size * mix_fraction)
    # So many may be left when the loader is asked for more.
    rows = _Rows(most_left=max(buffer_size, n_to_keep + batch_size) - 1)
    for activations in activations_loader:
        rows.add(activations)
        if len(rows) < buffer_size:
            continue
        if mix_fraction > 0:
            rows.shuffle()
        for _ in range(max(1, (len(rows) - n_to_keep) // batch_size)):
            yield rows.take(batch_size)
    while len(rows) >= batch_size:
        yield rows.take(batch_size)


class _Rows:
    """A queue of activations that can be shuffled. A row's place is free once it is taken.

    Attributes:
        memory: [n_places, ...].
        order: the places of the rows in the queue's order, [len(self)].
        free: the places of no row.
        generator: of the permutations; None for the default one.
    """

    memory: torch.Tensor
    order: torch.Tensor
    free: torch.Tensor
    generator: torch.Generator | None

    def __init__(self, most_left: int) -> None:
        self._most_left = most_left
        self._is_allocated = False

    def __len__(self) -> int:
        return len(self.order) if self._is_allocated else 0

    def add(self, rows: torch.Tensor) -> None:
        """Put rows, [n, ...], at the end of the queue."""
        if not self._is_allocated:
            self._allocate(self._most_left + len(rows), rows)
        width, device = self.memory.shape[1:], self.memory.device
        if rows.shape[1:] != width or rows.device != device:
            raise ValueError(
                f"activations_loader yields activations of shape {list(rows.shape)} on "
                f"{rows.device}, expected [n{''.join(f', {d}' for d in width)}] on {device}, as "
                "before"
            )
        n_missing = len(rows) - len(self.free)
        dtype = torch.promote_types(rows.dtype, self.memory.dtype)
        if n_missing > 0 or dtype != self.memory.dtype:
            self._grow(max(0, n_missing), dtype)
        places, self.free = self.free.split((len(rows), len(self.free) - len(rows)))
        self.memory.index_copy_(0, places, rows.to(dtype))
        self.order = torch.cat((self.order, places))

    def shuffle(self) -> None:
        n_rows = len(self.order)
        device = self.order.device
        self.order = self.order[torch.randperm(n_rows, device=device, generator=self.generator)]

    def take(self, n: int) -> torch.Tensor:
        """Return the first n rows, in memory of their own, and remove them from the queue."""
        places, self.order = self.order.split((n, len(self.order) - n))
        self.free = torch.cat((self.free, places))
        return self.memory[places]

    def _allocate(self, n_places: int, like: torch.Tensor) -> None:
        # Else a loader in inference mode makes memory that can only be written in that mode.
        with torch.inference_mode(False):
            self.memory = torch.empty(
                (n_places, *like.shape[1:]), dtype=like.dtype, device=like.device
            )
            self.free = torch.arange(n_places, device=like.device)
            self.order = self.free[:0]
        self.generator = _new_generator(like.device)
        self._is_allocated = True

    def _grow(self, n_places: int, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):
            first = len(self.memory)
            added = self.memory.new_empty((n_places, *self.memory.shape[1:]))
            self.memory = torch.cat((self.memory, added)).to(dtype)
            places = torch.arange(first, first + n_places, device=self.free.device)
        self.free = torch.cat((self.free, places))


def _new_generator(device: torch.device) -> torch.Generator | None:
    """Return a generator for permutations on a GPU, and None, the default one, elsewhere."""
    if device.type != "cuda":
        return None
    # While one thread records a CUDA graph, no other may draw from the GPU's default generator.
    # Batches that are prefetched are made in another thread.
    seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    return torch.Generator(device).manual_seed(seed)
