"""The group-quantised integer format: error bounds, exactness, bytes, refusals."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jettison.ir.errors import ArtifactError, OptionError, UnsupportedError
from jettison.ir.ops.quantized_linear import quantized_linear, unpack_codes, unpack_zeros
from jettison.passes.formats.int_groups import LARGEST_WEIGHT, IntGroups

LINEAR_MODULE = importlib.import_module("jettison.ir.ops.quantized_linear")
TINY_LLAMA = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama" / "model.safetensors"

FORMATS = [
    IntGroups(bits, group, symmetric) for bits in (8, 4, 3, 2) for group in (32, 64, 128) for symmetric in (False, True)
]
FLOAT_ZEROS = [IntGroups(bits, group, float_zeros=True) for bits in (8, 4, 3, 2) for group in (32, 128)]
any_format = st.sampled_from(FORMATS)
every_float = pytest.mark.parametrize("int_groups", FLOAT_ZEROS, ids=str)
every_format = pytest.mark.parametrize("int_groups", FORMATS, ids=str)


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def per_weight(per_group: Tensor, int_groups: IntGroups, columns: int) -> Tensor:
    """`[N, k_blocks]` -> `[N, K]`."""
    return per_group.repeat_interleave(int_groups.group, dim=1)[:, :columns]


def assert_within_bound(int_groups: IntGroups, weight: Tensor, parts: dict[str, Tensor]) -> None:
    """The bounds that the module docstring states, with room for the rounding of fp32 division and product."""
    rows, columns = weight.shape
    decoded = int_groups.decode(parts, (rows, columns)).double()
    weight = weight.double()
    step = per_weight(parts["scales"], int_groups, columns).double()
    bound = step.abs() / 2
    if int_groups.symmetric:
        # code 2**b would be needed beyond m (1 - 2**-b) on the side opposite to m = -2**(b-1) * step
        clipped = weight / step > 2 ** (int_groups.bits - 1) - 0.5
        bound = torch.where(clipped, step.abs(), bound)
    rounding = step.abs() * 2.0 ** (int_groups.bits - 22)
    error = (weight - decoded).abs()
    assert bool((error <= bound + rounding).all()), float((error / step.abs()).max())


# ---------------------------------------------------------------------------------------------------------- the text


def test_name_is_the_canonical_text():
    assert IntGroups(4, 32).name == "int4{group=32,symmetric=false}"
    assert str(IntGroups(bits=8, group=128, symmetric=True)) == "int8{group=128,symmetric=true}"
    assert IntGroups(3, 64, float_zeros=True).name == "int3{group=64,symmetric=false,float_zeros=true}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bits": 5, "group": 32},
            r"^\[int-groups\] bits=5: needs one of 8, 4, 3, 2, because .* Set bits to one of them\.$",
        ),
        ({"bits": True, "group": 32}, "bits=True: needs one of"),
        ({"bits": "4", "group": 32}, "bits='4': needs one of"),
        ({"bits": 4, "group": 48}, r"^\[int-groups\] group=48: needs one of 32, 64, 128, because"),
        ({"bits": 4, "group": 0}, "group=0: needs one of"),
        ({"bits": 4, "group": 32.0}, "group=32.0: needs one of"),
        ({"bits": 4, "group": 32, "symmetric": "yes"}, r"^\[int-groups\] symmetric='yes': needs true or false"),
        ({"bits": 4, "group": 32, "float_zeros": 1}, r"^\[int-groups\] float_zeros=1: needs true or false"),
        ({"symmetric": True, "float_zeros": True}, "symmetric groups have no zero points"),
    ],
)
def test_options_are_validated(options: dict[str, object], message: str):
    with pytest.raises(OptionError, match=message):
        IntGroups(**options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- the numbers


def test_encode_by_hand():
    # -8 ... 7 times 1/2, twice: step 1/2 and zero point 8 hit every value exactly, in either rule.
    weight = (torch.arange(-8, 8) / 2).repeat(2).view(1, 32)
    for int_groups in (IntGroups(4, 32), IntGroups(4, 32, symmetric=True)):
        parts = int_groups.encode(weight)
        assert parts["codes"].tolist() == [[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]]
        assert parts["scales"].tolist() == [[0.5]]
        assert torch.equal(int_groups.decode(parts, (1, 32)), weight)
    assert IntGroups(4, 32).encode(weight)["zeros"].tolist() == [[0x08]]
    assert "zeros" not in IntGroups(4, 32, symmetric=True).encode(weight)


def test_symmetric_scale_takes_the_sign_of_the_largest_entry():
    weight = torch.zeros(2, 32)
    weight[0, 5], weight[1, 5] = 4.0, -4.0
    parts = IntGroups(4, 32, symmetric=True).encode(weight)
    assert parts["scales"].tolist() == [[-0.5], [0.5]]
    assert torch.equal(IntGroups(4, 32, symmetric=True).decode(parts, (2, 32)), weight)


@settings(deadline=None, max_examples=150)
@given(
    int_groups=any_format,
    rows=st.integers(1, 6),
    columns=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    exponent=st.integers(-30, 30),
    offset=st.sampled_from([0.0, 0.0, 3.0, -100.0]),
    n_zeros=st.integers(0, 64),
    seed=st.integers(0, 2**16),
)
def test_error_bound_bytes_and_layout_hold_for_any_shape(
    int_groups: IntGroups,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    exponent: int,
    offset: float,
    n_zeros: int,
    seed: int,
):
    scale = 1.0 if dtype is torch.float16 else 10.0**exponent
    weight = ((normal(rows, columns, seed) + offset).double() * scale).to(dtype)
    weight[:, :n_zeros] = 0
    parts = int_groups.encode(weight)
    assert {name: (tuple(p.shape), p.dtype) for name, p in parts.items()} == int_groups.part_specs((rows, columns))
    assert int_groups.bytes((rows, columns)) == sum(part.nbytes for part in parts.values())
    assert bool(torch.isfinite(parts["scales"]).all())
    assert bool((parts["scales"] != 0).all())
    assert_within_bound(int_groups, weight, parts)


@every_format
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.1, -7.7e-20, 3.3e30, LARGEST_WEIGHT, -LARGEST_WEIGHT])
def test_constant_groups_come_back(int_groups: IntGroups, value: float):
    weight = torch.full((2, 300), value)
    decoded = int_groups.decode(int_groups.encode(weight), (2, 300))
    # One division and one product, each rounded to half a unit in the last place.
    assert torch.allclose(decoded, weight, rtol=torch.finfo(torch.float32).eps, atol=0)
    if value == 0:
        assert torch.equal(decoded, weight)


@every_format
def test_all_zero_groups_stay_zero_beside_others(int_groups: IntGroups):
    weight = normal(3, 4 * int_groups.group)
    weight[1, int_groups.group : 2 * int_groups.group] = 0
    parts = int_groups.encode(weight)
    assert parts["scales"][1, 1] == 1
    decoded = int_groups.decode(parts, tuple(weight.shape))
    assert not decoded[1, int_groups.group : 2 * int_groups.group].any()
    assert_within_bound(int_groups, weight, parts)


@every_format
def test_weights_below_the_smallest_scale_become_zero(int_groups: IntGroups):
    weight = normal(2, 128) * 1e-41
    assert weight.any()
    parts = int_groups.encode(weight)
    assert bool((parts["scales"] == 1).all())
    assert not int_groups.decode(parts, (2, 128)).any()


@every_format
def test_zeros_stay_exactly_zero(int_groups: IntGroups):
    weight = normal(4, 256) + 5
    weight[:, ::3] = 0
    assert not int_groups.decode(int_groups.encode(weight), (4, 256))[:, ::3].any()


@every_format
def test_an_outlier_costs_only_its_own_group(int_groups: IntGroups):
    weight = normal(2, 3 * int_groups.group)
    plain = int_groups.decode(int_groups.encode(weight), tuple(weight.shape))
    weight[0, int_groups.group + 7] = 1e6
    parts = int_groups.encode(weight)
    decoded = int_groups.decode(parts, tuple(weight.shape))
    # The rounded zero point may move the grid by as much as the other end of the range, here below 5.
    assert decoded[0, int_groups.group + 7] == pytest.approx(1e6, abs=5)
    assert_within_bound(int_groups, weight, parts)
    decoded[0, int_groups.group : 2 * int_groups.group] = plain[0, int_groups.group : 2 * int_groups.group]
    assert torch.equal(decoded, plain)


@every_format
@pytest.mark.parametrize("columns", [1, 33, 127, 129, 200])
def test_padding_decodes_to_zero_and_is_counted(int_groups: IntGroups, columns: int):
    parts = int_groups.encode(normal(3, columns) + 1)
    k_blocks = -(-columns // int_groups.group)
    codes = unpack_codes(parts["codes"], int_groups.bits).reshape(3, -1)
    zeros = torch.full((3, k_blocks), 2 ** (int_groups.bits - 1), dtype=torch.uint8)
    if not int_groups.symmetric:
        zeros = unpack_zeros(parts["zeros"], int_groups.bits, k_blocks).to(torch.uint8)
    padding = codes[:, columns:]
    assert torch.equal(padding, zeros[:, -1:].expand_as(padding))
    padded_columns = k_blocks * int_groups.group
    assert parts["codes"].nbytes == 3 * padded_columns * int_groups.bits // 8
    assert int_groups.decode(parts, (3, columns)).shape == (3, columns)


def test_bits_per_weight_counts_scales_zero_points_and_padding():
    assert IntGroups(4, 32, symmetric=True).bits_per_weight((64, 256)) == 4 + 32 / 32
    assert IntGroups(4, 32).bits_per_weight((64, 256)) == 4 + 32 / 32 + 4 / 32
    assert IntGroups(8, 128).bits_per_weight((64, 256)) == 8 + 32 / 128 + 8 / 128
    assert IntGroups(3, 128).bits_per_weight((64, 1024)) == 3 + 32 / 128 + 3 / 128
    assert IntGroups(2, 64, float_zeros=True).bits_per_weight((64, 256)) == 2 + 64 / 64
    # One column pays for a whole group, one scale and one byte of zero point.
    assert IntGroups(4, 32).bytes((1, 1)) == 16 + 4 + 1
    # Zero points of 3 bits fill whole bytes per row: 6 and 9 bits.
    assert IntGroups(3, 32).bytes((2, 64)) == 2 * (2 * 12 + 2 * 4 + 1)
    assert IntGroups(3, 32).bytes((2, 65)) == 2 * (3 * 12 + 3 * 4 + 2)


@pytest.mark.parametrize(
    ("int_groups", "error"),
    [
        (IntGroups(4, 32), 0.0065),
        (IntGroups(4, 64), 0.0083),
        (IntGroups(4, 128), 0.0101),
        (IntGroups(4, 32, symmetric=True), 0.0074),
        (IntGroups(4, 64, symmetric=True), 0.0090),
        (IntGroups(4, 128, symmetric=True), 0.0106),
        (IntGroups(3, 32), 0.0300),
        (IntGroups(3, 64), 0.0381),
        (IntGroups(3, 128), 0.0464),
        (IntGroups(4, 64, float_zeros=True), 0.0080),
        (IntGroups(3, 64, float_zeros=True), 0.0370),
        (IntGroups(2, 64, float_zeros=True), 0.203),
        (IntGroups(8, 32), 2.3e-5),
        (IntGroups(8, 64), 2.9e-5),
        (IntGroups(8, 128), 3.5e-5),
    ],
    ids=str,
)
def test_error_on_normal_weights_is_that_of_round_to_nearest(int_groups: IntGroups, error: float):
    weight = normal(512, 1024)
    decoded = int_groups.decode(int_groups.encode(weight), (512, 1024))
    assert float((weight - decoded).square().sum() / weight.square().sum()) == pytest.approx(error, rel=0.03)


@every_float
@pytest.mark.parametrize("offset", [0.0, 3.0, -100.0])
@pytest.mark.parametrize("columns", [1, 33, 300])
def test_float_zero_points_keep_half_a_step_wherever_zero_lies(int_groups: IntGroups, offset: float, columns: int):
    weight = normal(5, columns) + offset
    parts = int_groups.encode(weight)
    assert parts["zeros"].dtype == torch.float32
    if offset == 3:
        assert bool((parts["zeros"] < 0.5).any())
    error = (int_groups.decode(parts, (5, columns)) - weight).abs()
    step = per_weight(parts["scales"], int_groups, columns)
    # The zero point is many steps away where zero is, and is rounded to fp32.
    far = per_weight(parts["zeros"], int_groups, columns).abs() + 2**int_groups.bits
    assert bool((error <= step * (0.5 + 2.0**-22 * far)).all()), float((error / step).max())
    if columns == 300:
        # The padding of the last group is no part of its range.
        last = weight[:, 300 - 300 % int_groups.group :]
        grid = int_groups.fit(last.unsqueeze(1))
        assert torch.equal(grid.scales, parts["scales"][:, -1:])


@every_float
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, -7.7e-20, LARGEST_WEIGHT, -LARGEST_WEIGHT])
def test_float_zero_points_keep_constant_groups_exactly(int_groups: IntGroups, value: float):
    weight = torch.full((2, 300), value)
    assert torch.equal(int_groups.decode(int_groups.encode(weight), (2, 300)), weight)


@every_float
def test_float_zero_points_with_an_outlier_and_zero_rows(int_groups: IntGroups):
    weight = normal(3, 2 * int_groups.group)
    weight[1] = 0
    weight[0, 5] = 1e6
    parts = int_groups.encode(weight)
    decoded = int_groups.decode(parts, tuple(weight.shape))
    assert not decoded[1].any()
    assert bool(torch.isfinite(decoded).all())
    assert decoded[0, 5] == pytest.approx(1e6, rel=1e-6)
    error = (decoded - weight).abs()
    assert bool((error <= 0.501 * per_weight(parts["scales"], int_groups, weight.shape[1])).all())


@every_format
def test_real_weights_stay_within_the_bound(int_groups: IntGroups):
    with safe_open(TINY_LLAMA, framework="pt") as tensors:
        for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
            weight = tensors.get_tensor(name)
            parts = int_groups.encode(weight, name)
            assert_within_bound(int_groups, weight, parts)


# -------------------------------------------------------------------------------------------------- rows and memory


@every_format
def test_result_does_not_depend_on_how_rows_are_split(monkeypatch: pytest.MonkeyPatch, int_groups: IntGroups):
    weight = normal(13, 200).to(torch.bfloat16)
    whole = int_groups.encode_rows(weight)
    monkeypatch.setattr(LINEAR_MODULE, "CHUNK_WEIGHTS", 500)
    chunked = int_groups.encode(weight)
    assert whole.keys() == chunked.keys()
    assert all(torch.equal(whole[name], chunked[name]) for name in whole)
    by_row = [int_groups.encode_rows(weight[row : row + 1]) for row in range(13)]
    assert all(torch.equal(torch.cat([parts[name] for parts in by_row]), whole[name]) for name in whole)
    decoded = int_groups.decode(chunked, (13, 200))
    monkeypatch.undo()
    assert torch.equal(decoded, int_groups.decode(chunked, (13, 200)))


def test_encode_reads_any_strides_and_leaves_the_weight_alone():
    int_groups = IntGroups(4, 32)
    weight = torch.nn.Parameter(normal(96, 40))
    before = weight.detach().clone()
    parts = int_groups.encode(weight.t())
    assert torch.equal(weight.detach(), before)
    assert not parts["scales"].requires_grad
    contiguous = int_groups.encode(before.t().contiguous())
    assert all(torch.equal(parts[name], contiguous[name]) for name in parts)


def test_encode_fills_tensors_of_the_caller(tmp_path: Path):
    int_groups, weight = IntGroups(4, 32), normal(7, 64)
    out = {
        name: torch.from_file(str(tmp_path / name), shared=True, size=torch.Size(dims).numel(), dtype=dtype).view(dims)
        for name, (dims, dtype) in int_groups.part_specs((7, 64)).items()
    }
    assert int_groups.encode(weight, out=out) is out
    for name, part in int_groups.encode(weight).items():
        assert (tmp_path / name).read_bytes() == part.numpy().tobytes()
    with pytest.raises(ArtifactError, match="needs codes uint8"):
        int_groups.encode(normal(8, 64), out=out)


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor any operator returns, views of `known` storages aside."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.known:
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("columns", [512, 500])
def test_working_memory_does_not_grow_with_the_weight(columns: int):
    int_groups = IntGroups(4, 32)
    weight = torch.empty(16384, columns, dtype=torch.bfloat16).normal_(generator=torch.Generator().manual_seed(0))
    out = {name: torch.empty(d, dtype=t) for name, (d, t) in int_groups.part_specs((16384, columns)).items()}
    with LargestTensor([weight, *out.values()]) as watched:
        int_groups.encode(weight, out=out)
    assert 2**20 < watched.nbytes < 1.1 * 4 * LINEAR_MODULE.CHUNK_WEIGHTS


@pytest.mark.parametrize(
    "int_groups",
    [
        IntGroups(4, 64), IntGroups(4, 64, symmetric=True), IntGroups(8, 64), IntGroups(3, 64),
        IntGroups(3, 64, symmetric=True), IntGroups(2, 64, float_zeros=True),
    ],
    ids=str,
)  # fmt: skip
def test_operator_reads_the_parts(int_groups: IntGroups):
    weight, x = normal(24, 200), normal(7, 200, seed=1)
    parts = int_groups.encode(weight)
    y = quantized_linear(x, parts["codes"], parts["scales"], parts.get("zeros"), None, int_groups.bits, 64, 200)
    expected = x @ int_groups.decode(parts, (24, 200)).t()
    assert float((y - expected).abs().max()) <= 2e-6 * float(expected.abs().max())
    assert float((y - x @ weight.t()).abs().max()) > 0


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_values_without_a_finite_scale_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool, value: float
):
    monkeypatch.setattr(LINEAR_MODULE, "CHUNK_WEIGHTS", 300)  # row 5 is then not in the first chunk
    int_groups, weight = IntGroups(4, 32, symmetric), normal(9, 100)
    weight[5, 98] = value
    with pytest.raises(UnsupportedError) as caught:
        int_groups.encode(weight, where="model.layers.3.mlp.up_proj.weight")
    message = str(caught.value)
    assert message.startswith(
        f"[{int_groups.name}] model.layers.3.mlp.up_proj.weight: entry [5, 98] is {float(weight[5, 98])}"
    )
    assert message.endswith("Repair the checkpoint, or leave this weight out of the pass (skip='...').")


@pytest.mark.parametrize(
    ("weight", "found"),
    [
        (torch.zeros(4), r"float32\[4\]"),
        (torch.zeros(2, 4, 32), r"float32\[2, 4, 32\]"),
        (torch.zeros(0, 32), r"float32\[0, 32\]"),
        (torch.zeros(4, 0), r"float32\[4, 0\]"),
        (torch.zeros(4, 32, dtype=torch.int8), r"int8\[4, 32\]"),
    ],
)
def test_only_floating_point_matrices_are_encoded(weight: Tensor, found: str):
    for encode in (IntGroups(4, 32).encode, IntGroups(4, 32).encode_rows):
        with pytest.raises(UnsupportedError, match=f"lm_head.weight: found {found}, needs a non-empty floating-point"):
            encode(weight, "lm_head.weight")


def test_decode_refuses_parts_of_another_layout():
    int_groups = IntGroups(4, 32)
    parts = int_groups.encode(normal(4, 64))
    for bad in [
        {"codes": parts["codes"], "scales": parts["scales"]},
        {**parts, "scales": parts["scales"].double()},
        {**parts, "codes": parts["codes"][:3]},
        {},
    ]:
        with pytest.raises(
            ArtifactError, match=r"needs codes uint8\[4, 2, 16\], scales float32\[4, 2\], zeros uint8\[4, 1\]"
        ):
            int_groups.decode(bad, (4, 64))
    with pytest.raises(ArtifactError, match="parts of a weight"):
        IntGroups(4, 32, symmetric=True).decode(parts, (4, 64))
    with pytest.raises(ArtifactError, match="parts of a weight"):
        int_groups.decode(parts, (4, 65))
