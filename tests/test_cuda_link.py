"""Who has a symbol, as `make cuda-link` tells it; the link itself needs nvcc and a download."""

from __future__ import annotations

import cuda_link


def test_a_symbol_that_no_library_has_is_told_from_one_of_the_driver() -> None:
    needed = cuda_link.needed(
        "aoti_x U\ncuInit U\ncudaMalloc U\nfree@GLIBC_2.2 U\nold@V1 U\n__gmon_start__ w\n"
    )
    assert needed == {"aoti_x", "cuInit", "cudaMalloc", "free@GLIBC_2.2", "old@V1"}
    libraries = {
        "libtorch.so": cuda_link.provided("aoti_x T 12a0 8\n"),
        "libc.so": cuda_link.provided(
            "free@@GLIBC_2.2 T 3b0 1c\nold@@V2 T 4c0 8\nolder@V1 T 4d0 8\naoti_x T 1 1\n"
        ),
    }
    assert libraries["libc.so"] >= {"free", "old", "older@V1"} and "older" not in libraries["libc.so"]
    assert cuda_link.found_in(needed, libraries) == {
        "libtorch.so": ["aoti_x"],
        "libc.so": ["free@GLIBC_2.2"],
        cuda_link.DRIVER: ["cuInit"],
        cuda_link.NOWHERE: ["cudaMalloc", "old@V1"],
    }
