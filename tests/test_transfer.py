"""Several arrays go to the device as one."""

import numpy as np
import torch

from labkit.transfer import pack, put_all, unpack


def test_what_is_packed_is_unpacked_as_it_was():
    rng = np.random.default_rng(0)
    arrays = {
        "positions": rng.integers(0, 99, 7),
        "table": rng.integers(0, 99, (5, 3)).astype(np.int32),
        "columns of a table": rng.integers(0, 99, (4, 8)).astype(np.int32)[:, ::2],
        "none": np.zeros(0, np.int64),
        "mask": rng.random((3, 5)) < 0.5,
        "bytes": rng.integers(0, 9, 3).astype(np.uint8),
        "deep": rng.normal(size=(2, 1, 3)).astype(np.float32),
        "axes": rng.integers(0, 99, (3, 6)),
    }
    flat = pack(arrays.values())
    found, plain = unpack(flat, arrays), put_all(arrays, torch.device("cpu"))
    for name, array in arrays.items():
        assert torch.equal(found[name], torch.from_numpy(np.ascontiguousarray(array))), name
        assert torch.equal(found[name], plain[name]) and found[name].is_contiguous(), name
        assert found[name].dtype == plain[name].dtype
        assert not len(array) or (found[name].data_ptr() - flat.data_ptr()) % 16 == 0, "kernels read 16 bytes at a time"
