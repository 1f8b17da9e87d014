"""Weighted sums: against float64, bit by bit where that is promised, and what is refused."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from searchlab.cuda_ext import merge_experts, weighted_sum
from searchlab.cuda_ext._registration import numbers, pointers
from searchlab.cuda_ext.weighted_sum import weighted_sum_reference

TYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, 7, 64, 1003, 40_000)  # odd ones, a tile, more than a chunk


def rows(count: int, size: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for _ in range(count)]


def table(results: int, count: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return scale * torch.randn(results, count, generator=generator, dtype=torch.float64)


def bound(sources: list[Tensor], coefficients: Tensor) -> Tensor:
    """1e-6 times the 1-norm of the coefficients times the greatest weight, (P, 1)."""
    greatest = max(float(source.float().abs().max()) for source in sources)
    return 1e-6 * greatest * coefficients.abs().sum(1, keepdim=True)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("results", [1, 3, 20])
def test_equals_the_sum_in_double_precision(dtype: torch.dtype, size: int, results: int) -> None:
    sources, coefficients = rows(9, size, dtype), table(results, 9)
    exact = weighted_sum_reference(sources, coefficients)
    scattered = weighted_sum(sources, coefficients)
    stacked = weighted_sum(torch.stack(sources), coefficients)
    for out in (scattered, stacked):
        assert isinstance(out, Tensor)
        assert ((out - exact).abs() <= bound(sources, coefficients)).all()


def test_one_of_twenty_equals_itself_alone() -> None:
    sources, coefficients = rows(12, 5000, torch.float32), table(20, 12)
    together = weighted_sum(torch.stack(sources), coefficients)
    for p in range(20):
        alone = weighted_sum(torch.stack(sources), coefficients[p : p + 1])
        assert isinstance(together, Tensor)
        assert isinstance(alone, Tensor)
        difference = (together[p] - alone[0]).abs().max()
        assert difference <= bound(sources, coefficients[p : p + 1]).item()


@pytest.mark.parametrize("dtype", TYPES)
def test_a_single_one_copies_bits(dtype: torch.dtype) -> None:
    sources = rows(5, 301, dtype)
    sources[3][7] = -0.0
    sources[3][8] = torch.nan
    sources[0][:] = torch.inf
    out = weighted_sum(sources, torch.eye(5), dtype=dtype)
    assert isinstance(out, Tensor)
    for k in range(5):
        assert torch.equal(out[k].view(torch.uint8), sources[k].view(torch.uint8))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_source_of_weight_zero_never_leaks(dtype: torch.dtype) -> None:
    sources, coefficients = rows(6, 200, dtype), table(4, 6)
    clean = weighted_sum(sources, coefficients * torch.tensor([1, 1, 0, 1, 1, 1]))
    sources[2][:] = torch.nan
    coefficients[0, 2] = coefficients[2, 2] = 0
    out = weighted_sum(sources, coefficients)
    assert isinstance(out, Tensor)
    assert isinstance(clean, Tensor)
    assert torch.allclose(out[[0, 2]], clean[[0, 2]], rtol=1e-6, atol=1e-5)
    assert torch.isnan(out[[1, 3]]).all()


def test_a_base_is_added_and_zero_rows_are_zero() -> None:
    sources, base = rows(3, 99, torch.float16), rows(1, 99, torch.float32, seed=5)[0]
    coefficients = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0.5, -2, 0.25]])
    with_base = weighted_sum(sources, coefficients, base=base)
    assert isinstance(with_base, Tensor)
    assert torch.equal(with_base[0], base)
    exact = weighted_sum_reference(sources, coefficients, base)
    assert ((with_base - exact).abs() <= 1e-5).all()
    without = weighted_sum(sources, coefficients)
    assert isinstance(without, Tensor)
    assert torch.equal(without[0], torch.zeros(99))


def test_results_are_written_where_they_are_wanted() -> None:
    sources, coefficients = rows(4, 50, torch.bfloat16), table(2, 4)
    wanted = [torch.empty(50, dtype=torch.bfloat16) for _ in range(2)]
    made = weighted_sum(sources, coefficients, wanted)
    assert made is wanted
    exact = weighted_sum_reference(sources, coefficients)
    for p in range(2):
        assert torch.allclose(wanted[p].double(), exact[p], rtol=2**-7, atol=2**-7)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 300),
    count=st.integers(1, 30),
    results=st.integers(1, 6),
    dtype=st.sampled_from(TYPES),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_the_bodies_of_the_kernel_equal_the_sum(
    bodies: ctypes.CDLL,
    size: int,
    count: int,
    results: int,
    dtype: torch.dtype,
    zeros: float,
    seed: int,
) -> None:
    sources, coefficients = rows(count, size, dtype, seed), table(results, count, seed).float()
    generator = torch.Generator().manual_seed(seed)
    coefficients[torch.rand(results, count, generator=generator) < zeros] = 0
    out = torch.empty(results, size)
    outputs = list(out.unbind(0))
    bodies.cpu_weighted_sum(
        *(pointers(sources), count, ctypes.c_void_p(coefficients.data_ptr()), pointers(outputs)),
        *(results, None, ctypes.c_int64(size), numbers(sources)[0], 0),
    )
    exact = weighted_sum_reference(sources, coefficients)
    assert ((out - exact).abs() <= bound(sources, coefficients)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 16, 50])
def test_the_lanes_of_the_matrix_route_make_the_sum(
    bodies: ctypes.CDLL, dtype: torch.dtype, count: int
) -> None:
    """Who holds what fits together, and three parts of a coefficient lose nothing of it."""
    sources = rows(count, 64, dtype)
    coefficients = table(16, count).float()
    coefficients[3] *= 1e-4
    coefficients[5] = 0
    out = torch.empty(16, 64)
    bodies.cpu_matrix_tile(
        *(pointers(sources), count, ctypes.c_void_p(coefficients.data_ptr()), 16),
        *(ctypes.c_void_p(out.data_ptr()), numbers(sources)[0]),
    )
    exact = weighted_sum_reference(sources, coefficients)
    assert ((out - exact).abs() <= bound(sources, coefficients)).all()


@pytest.mark.parametrize(("code", "dtype"), [(1, torch.float16), (2, torch.bfloat16)])
def test_rounding_is_that_of_torch(bodies: ctypes.CDLL, code: int, dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int64).to(torch.int32)
    edges = torch.tensor(
        [0.0, -0.0, 65504, 65519.9, 65520, 6e-8, 2.9e-8, 6.1e-5, torch.inf, -torch.inf]
    )
    values = torch.cat([bits.view(torch.float32), edges])
    out = torch.empty_like(values)
    bodies.cpu_round_trip(
        *(ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(len(values)), code),
        ctypes.c_void_p(out.data_ptr()),
    )
    wanted = values.to(dtype).float()
    assert torch.equal(torch.isnan(out), torch.isnan(wanted))
    fine = ~torch.isnan(wanted)
    assert torch.equal(out[fine].view(torch.int32), wanted[fine].view(torch.int32))


def test_experts_are_merged_and_copied() -> None:
    experts = torch.randn(6, 4, 10).to(torch.bfloat16)
    matrix = torch.zeros(3, 6)
    matrix[0, 4] = 1
    matrix[1] = torch.linspace(-1, 1, 6)
    matrix[2, 0] = matrix[2, 1] = 0.5
    out = merge_experts(matrix, experts)
    assert out.shape == (3, 4, 10)
    assert torch.equal(out[0], experts[4])
    exact = torch.einsum("ij,jab->iab", matrix.double(), experts.double())
    assert torch.allclose(out.double(), exact, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weighted_sum([], torch.ones(1, 0)), "no sources"),
        (lambda: weighted_sum(torch.ones(2, 3), torch.ones(0, 2)), "P >= 1"),
        (lambda: weighted_sum(torch.ones(2, 3), torch.ones(1, 3)), "coefficients of shape"),
        (lambda: weighted_sum(torch.ones(2, 3, dtype=torch.int8), torch.ones(1, 2)), "int8"),
        (lambda: weighted_sum([torch.ones(3), torch.ones(4)], torch.ones(1, 2)), "source 1"),
        (lambda: weighted_sum([torch.ones(3), torch.ones(3).half()], torch.ones(1, 2)), "one type"),
        (lambda: weighted_sum(torch.ones(3, 2).T, torch.ones(1, 2)), "not contiguous"),
        (lambda: weighted_sum(torch.ones(2, 3), torch.ones(1, 2), torch.ones(2, 3)), "2 outputs"),
        (lambda: weighted_sum(torch.ones(2, 3), torch.ones(1, 2), torch.ones(1, 4)), "output 0"),
        (lambda: weighted_sum(torch.ones(2, 3), torch.ones(1, 2), base=torch.ones(2)), "base of 2"),
        (lambda: weighted_sum(torch.ones(2, 3), torch.ones(1, 2), dtype=torch.float64), "float64"),
        (lambda: merge_experts(torch.ones(1, 2), torch.ones(2)), "experts of shape"),
        (lambda: merge_experts(torch.ones(1, 2), torch.ones(2, 3), torch.ones(2, 3)), "output of"),
    ],
)
def test_what_does_not_fit_is_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_torch_checks_the_operation() -> None:
    sources, coefficients = rows(3, 20, torch.float32), table(2, 3).float()
    outputs = [torch.empty(20), torch.empty(20)]
    torch.library.opcheck(
        torch.ops.searchlab.weighted_sum.default, (sources, coefficients, None, outputs)
    )


def test_it_compiles() -> None:
    def mixed(stack: Tensor, coefficients: Tensor) -> Tensor:
        out = weighted_sum(stack, coefficients)
        assert isinstance(out, Tensor)
        return out * 2

    stack, coefficients = torch.stack(rows(3, 40, torch.float32)), table(2, 3).float()
    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(stack, coefficients), mixed(stack, coefficients))


# -- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1, 63, 64, 1003, 1_000_064])
@pytest.mark.parametrize("results", [1, 2, 3, 8, 9, 20, 33])
def test_kernels_equal_the_sum(
    gpu: torch.device, dtype: torch.dtype, size: int, results: int
) -> None:
    sources = [row.to(gpu) for row in rows(19, size, dtype)]
    coefficients = table(results, 19)
    coefficients[0, 3] = 0
    out = weighted_sum(sources, coefficients)
    assert isinstance(out, Tensor)
    exact = weighted_sum_reference(sources, coefficients)
    assert ((out - exact).abs() <= bound(sources, coefficients).to(gpu)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("results", [1, 5, 20])
def test_kernels_skip_zeros_and_copy_bits(
    gpu: torch.device, dtype: torch.dtype, results: int
) -> None:
    sources = [row.to(gpu) for row in rows(20, 1003, dtype)]
    sources[2][:500] = torch.nan
    sources[2][500:] = torch.inf
    sources[4][3] = -0.0
    coefficients = table(results, 20)
    coefficients[:, 2] = 0
    coefficients[-1] = 0
    coefficients[-1, 4] = 1
    out = weighted_sum(sources, coefficients, dtype=dtype)
    assert isinstance(out, Tensor)
    assert torch.isfinite(out).all()
    assert torch.equal(out[-1].view(torch.uint8), sources[4].view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
def test_kernels_take_any_address_and_many_sources(gpu: torch.device, dtype: torch.dtype) -> None:
    whole = [row.to(gpu) for row in rows(500, 1002, dtype)]
    sources = [row[1:] for row in whole]
    coefficients, base = table(3, 500, scale=0.1), torch.randn(1001, device=gpu)
    out = weighted_sum(sources, coefficients, base=base)
    assert isinstance(out, Tensor)
    exact = weighted_sum_reference(sources, coefficients, base)
    assert ((out - exact).abs() <= bound(sources, coefficients).to(gpu)).all()


@pytest.mark.gpu
@pytest.mark.slow
def test_more_elements_than_an_int_counts(gpu: torch.device) -> None:
    size = 2**31 + 129
    source = torch.ones(size, dtype=torch.bfloat16, device=gpu)
    source[-1] = 3
    out = weighted_sum([source, source], torch.tensor([[0.5, 1.0]]), dtype=torch.bfloat16)
    assert isinstance(out, Tensor)
    assert float(out[0, -1]) == 4.5
    assert float(out[0, 2**31]) == 1.5
