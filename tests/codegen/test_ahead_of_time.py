"""Kernels as machine code, without a GPU: every template compiles, and nothing spills."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from jettison.codegen.triton.ahead_of_time import Compiled, check_archs, compile_ahead
from jettison.codegen.triton.kernels.base import Kernel, Tuning
from jettison.codegen.triton.kernels.low_rank_attention import Masks
from jettison.ir.errors import CodegenError, OptionError
from tests.codegen.test_triton_sources import KERNELS, WIDE

ARCHS = ["sm_80", "sm_90"]
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10}


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    return compile_ahead([(kernel, kernel.tunings()[0]) for kernel in KERNELS.values()], ARCHS)


def test_every_template_compiles(compiled):
    assert [(each.name, each.arch) for each in compiled] == [
        (kernel.name, arch) for kernel in KERNELS.values() for arch in ARCHS
    ]
    assert all(each.cubin.startswith(b"\x7fELF") for each in compiled)


def test_nothing_spills(compiled):
    assert {(each.name, each.arch): each.spill_bytes for each in compiled if each.spill_bytes} == {}


def test_programs_fit_a_multiprocessor(compiled):
    for each in compiled:
        assert 16 <= each.registers <= 255, each.name
        assert each.shared_bytes <= SHARED_BYTES[each.arch], each.name


class Broken(Kernel):
    """A kernel that is none."""

    name = "broken"
    title = "Broken."
    parameters = {"x_ptr": "*fp32"}  # noqa: RUF012

    def tunings(self) -> list[Tuning]:
        return [Tuning.of(BLOCK=16)]

    def grid(self, tuning, sizes):
        return (1,)

    def body(self) -> str:
        return "    tl.store(x_ptr, unknown)"


def test_attention_over_factors_with_everything_at_once_does_not_spill():
    masks = Masks(True, 4096, True, True, True)
    kernel = dataclasses.replace(WIDE, has_bias=(True,) * 3, rotated=WIDE.dim, masks=masks, dtype=torch.bfloat16)
    assert [each.spill_bytes for each in compile_ahead([(kernel, kernel.tunings()[0])], ARCHS)] == [0, 0]


def test_what_does_not_compile_is_named():
    kernel = Broken()
    with pytest.raises(CodegenError, match=r"kernel broken does not compile for sm_90: .*unknown"):
        compile_ahead([(kernel, kernel.tunings()[0])], ["sm_90"])


@pytest.mark.parametrize("arch", ["sm_70", "gfx942", "90", "sm_9000", ""])
def test_other_architectures_are_refused(arch):
    with pytest.raises(OptionError, match="needed architectures from sm_80 on"):
        check_archs([arch])
    check_archs(ARCHS)
