"""The sampler's linear combinations: against one einsum; bits do not depend on the batch."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from searchlab.cuda_ext import solver_update
from searchlab.cuda_ext._registration import numbers, pointers
from searchlab.cuda_ext.solver_update import solver_update_reference


def states(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def numbers_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_equals_one_einsum(dtype: torch.dtype) -> None:
    inputs, coefficients = states(5, (3, 4, 6), dtype), numbers_of((3, 2, 5))
    kept = dtype if dtype == torch.float64 else torch.float32
    out = solver_update(inputs, coefficients, dtypes=[kept, kept])
    exact = solver_update_reference(inputs, coefficients)
    for o in range(2):
        assert torch.allclose(out[o].double(), exact[o], rtol=1e-6, atol=1e-6)


def test_guidance_and_conversion_are_coefficients() -> None:
    x, conditional, unconditional = states(3, (2, 3, 4), torch.float32)
    alpha, sigma, scale, next_alpha, next_sigma = 0.8, 0.6, 7.5, 0.9, 0.43
    noise = unconditional + scale * (conditional - unconditional)
    data = (x - sigma * noise) / alpha
    step = next_alpha * data + next_sigma * noise
    to_data = torch.tensor([1 / alpha, -sigma * scale / alpha, -sigma * (1 - scale) / alpha])
    to_step = next_alpha * to_data + next_sigma * torch.tensor([0, scale, 1 - scale])
    out = solver_update([x, conditional, unconditional], torch.stack([to_step, to_data]))
    assert torch.allclose(out[0], step, rtol=1e-5, atol=1e-5)
    assert torch.allclose(out[1], data, rtol=1e-5, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    inputs, coefficients = states(4, (7, 5, 3), torch.float32), numbers_of((7, 1, 4))
    together = solver_update(inputs, coefficients)[0]
    for b in range(7):
        alone = solver_update([x[b : b + 1] for x in inputs], coefficients[b : b + 1])[0]
        assert torch.equal(alone[0], together[b])


def test_inputs_of_coefficient_zero_are_not_looked_at() -> None:
    inputs, coefficients = states(3, (2, 4), torch.float32), numbers_of((2, 1, 3))
    inputs[1][0] = torch.nan
    coefficients[0, 0, 1] = 0
    out = solver_update(inputs, coefficients)[0]
    assert torch.isfinite(out).all()


def test_the_bodies_of_the_kernel_equal_the_einsum(bodies: ctypes.CDLL) -> None:
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float32]
    inputs = [x.to(kind) for x, kind in zip(states(4, (3, 10), torch.float32), kinds, strict=True)]
    coefficients = numbers_of((3, 2, 4)).float()
    coefficients[1, 0, 2] = 0
    outputs = [torch.empty(3, 10), torch.empty(3, 10, dtype=torch.bfloat16)]
    bodies.cpu_solver_update(
        *(pointers(inputs), numbers(inputs), 4, ctypes.c_void_p(coefficients.data_ptr())),
        *(pointers(outputs), numbers(outputs), 2, ctypes.c_int64(3), ctypes.c_int64(10)),
    )
    exact = solver_update_reference(inputs, coefficients)
    assert torch.allclose(outputs[0].double(), exact[0], rtol=1e-6, atol=1e-6)
    assert torch.allclose(outputs[1].double(), exact[1], rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("inputs", "shape", "message"),
    [
        ([], (1, 0), "0 inputs"),
        ([torch.ones(2, 3)] * 33, (1, 33), "33 inputs"),
        ([torch.ones(2, 3), torch.ones(2, 4)], (1, 2), "input 1"),
        ([torch.ones(2, 3, dtype=torch.int64)], (1, 1), "int64"),
        ([torch.ones(2, 3)], (5, 1), "O from 1 to 4"),
        ([torch.ones(2, 3)], (3, 1, 1), "coefficients for 3 samples"),
    ],
)
def test_what_does_not_fit_is_named(
    inputs: list[Tensor], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        solver_update(inputs, torch.ones(shape))


def test_torch_checks_the_operation() -> None:
    inputs = states(3, (2, 5), torch.float32)
    table = numbers_of((2, 1, 3)).float()
    torch.library.opcheck(
        torch.ops.searchlab.solver_update.default, (inputs, table, [torch.empty(2, 5)])
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 4, 8), (5, 7), (2, 3, 64, 64)])
@pytest.mark.parametrize("results", [1, 2, 3])
def test_kernels_equal_the_einsum(gpu: torch.device, shape: tuple[int, ...], results: int) -> None:
    inputs = [x.to(gpu) for x in states(6, shape, torch.float32)]
    coefficients = numbers_of((shape[0], results, 6))
    coefficients[0, 0, 2] = 0
    out = solver_update(inputs, coefficients)
    exact = solver_update_reference(inputs, coefficients)
    for o in range(results):
        assert torch.allclose(out[o].double(), exact[o], rtol=1e-5, atol=1e-5)
    halves = solver_update([x.bfloat16() for x in inputs], coefficients)
    for o in range(results):
        assert torch.allclose(halves[o].double(), exact[o], rtol=2e-2, atol=5e-2)


@pytest.mark.gpu
def test_a_captured_graph_replays_the_same_bits(gpu: torch.device) -> None:
    inputs = [x.to(gpu) for x in states(4, (8, 3, 32, 32), torch.bfloat16)]
    table = numbers_of((8, 1, 4)).to(gpu, torch.float32)
    eager = solver_update(inputs, table)[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        solver_update(inputs, table)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solver_update(inputs, table)[0]
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, eager)
