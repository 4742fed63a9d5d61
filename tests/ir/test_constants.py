"""Constants: stored and seen form, blocks, and scratch tensors."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from jettison.ir.constants import Constant, scratch_tensor
from jettison.ir.errors import ArtifactError


def test_rows_of_blocks_equal_the_concatenation() -> None:
    blocks = [torch.arange(n * 4, dtype=torch.bfloat16).reshape(n, 4) for n in (3, 1, 5)]
    constant = Constant("weight", blocks, torch.float32)
    whole = torch.cat(blocks).float()
    assert constant.shape == (9, 4)
    assert torch.equal(constant.value(), whole)
    for start in range(9):
        for stop in range(start + 1, 10):
            assert torch.equal(constant.rows(start, stop), whole[start:stop])
    assert constant.stored_bytes == 9 * 4 * 2
    assert constant.nbytes == 9 * 4 * 4


def test_digest_tells_contents_apart() -> None:
    first, same, other = (Constant("weight", torch.full((4,), value)) for value in (1.0, 1.0, 2.0))
    assert first.digest == same.digest != other.digest
    assert first.serial != same.serial


def test_large_scratch_takes_no_anonymous_memory() -> None:
    def anonymous() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

    before = anonymous()
    tensor = scratch_tensor((64 << 20,), torch.uint8)
    tensor.fill_(7)
    grown = anonymous() - before
    assert int(tensor.sum(dtype=torch.int64)) == 7 * (64 << 20)
    assert grown < 16 << 20


def test_full_disk_is_one_error_that_names_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ArtifactError, match=r"TMPDIR"):
        scratch_tensor((4 << 20,), torch.uint8)


def test_the_share_of_zeros_is_counted_over_blocks_and_kept():
    blocks = [torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.bfloat16), torch.tensor([[-0.0, 3.0]]).bfloat16()]
    constant = Constant("w", blocks, torch.float32)
    assert constant.zeros == 0.5
    blocks[0].zero_()
    assert constant.zeros == 0.5
    assert Constant("w", torch.ones(3, 2)).zeros == 0.0
