"""Where the large images of an accelerated network lie; raises where it is not as it should be.

    python tests/arena.py [few]

`few`: in a process whose addresses are limited.

A program, because what a test suite leaves in the arena fills gaps of its own.
"""

from __future__ import annotations

import gc
import random
import resource
import sys
import threading
from pathlib import Path

import torch
from torch import Tensor

from difusores import ops
from difusores.acceleration import heap

PAGE = 4096
MIB = 1 << 20
ZEROS = torch.zeros(64 * MIB // 4)  # what images are made of: nothing else of their size comes and goes


class User:
    """Somebody for whom memory is kept."""


def image(mib: int, value: float = 0.0) -> Tensor:
    """What a kernel returns: `mib` MiB, all of one value."""
    x = ZEROS[: mib * MIB // 4].view(1, 1, -1, 1024)
    return ops.group_norm_silu(x, 1, torch.ones(1), torch.full((1,), value), silu=False)


def address(t: Tensor) -> int:
    return t.data_ptr()


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE / MIB


def gaps() -> None:
    """An image takes the gap that fits best; gaps side by side are one."""
    a, b, c, d = (image(size) for size in (8, 16, 4, 8))
    at = address(a)
    assert [address(t) - at for t in (b, c, d)] == [8 * MIB, 24 * MIB, 28 * MIB]
    del b
    b = image(12)
    assert address(b) == at + 8 * MIB
    del b
    b = image(16)
    assert address(b) == at + 8 * MIB
    del a, c
    c = image(4)
    assert address(c) == at + 24 * MIB, "not the larger gap that comes first"
    del b
    b = image(24)
    assert address(b) == at, "a gap before and what was given back"
    del c, b
    assert address(image(28)) == at, "what was given back and the gap before"
    del d
    assert address(image(48)) == at, "a gap at the end grows"
    assert address(image(3)) % PAGE, "small ones are on the heap"


def threads() -> None:
    """Images of several threads keep their values."""
    wrong: list[float] = []

    def work(number: int) -> None:
        sizes, held = random.Random(number), list[tuple[Tensor, float]]()
        for step in range(60):
            held.append((image(sizes.choice((4, 5, 8)), number + step / 100), number + step / 100))
            if len(held) > 3:
                t, value = held.pop(sizes.randrange(3))
                if not bool((t == torch.tensor(value)).all()):
                    wrong.append(value)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong


def gives_back(user: User) -> None:
    """Without a user, free memory goes back to the system, at once and when an image goes; images stay."""
    held = image(64, 3.0)
    first, second = image(32), image(32)
    del first, second
    before = resident_mib()
    heap.release(user)
    assert before - resident_mib() > 60
    assert bool((held == 3.0).all())
    before = resident_mib()
    del held
    assert before - resident_mib() > 60
    assert address(image(8)) % PAGE, "the heap's again"


def goes_with_its_user() -> None:
    """A user that is gone needs nothing, restored or not."""
    user = User()
    heap.keep(user)
    image(64)
    before = resident_mib()
    del user
    gc.collect()
    assert before - resident_mib() > 60


def few_addresses() -> None:
    """Where the process may not have many addresses, none are reserved, and images are the heap's."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))
    user = User()
    heap.keep(user)
    assert address(image(8)) % PAGE


def main() -> None:
    if "few" in sys.argv:
        few_addresses()
        return
    assert address(image(8)) % PAGE, "without a user, images are the heap's"
    user = User()
    heap.keep(user)
    gaps()
    threads()
    gives_back(user)
    goes_with_its_user()


if __name__ == "__main__":
    torch.set_num_threads(2)
    with torch.no_grad():
        main()
