// The step of a multistep sampler: linear combinations of states and model outputs, with
// coefficients of their own for every sample. Every input is read once, whatever the outputs.
#include <cuda_runtime.h>

#include "api.h"
#include "elements.h"
#include "vectors.cuh"

namespace searchlab {
namespace {

constexpr int kMostInputs = 32, kMostOutputs = 4, kThreads = 256;

struct Step {
  const void* inputs[kMostInputs];
  void* outputs[kMostOutputs];
  signed char in_types[kMostInputs], out_types[kMostOutputs];
  int n_inputs, n_outputs;
};

// Four elements as one word of 16 or 8 bytes.
template <std::size_t Bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};

template <typename T, int V>
__device__ __forceinline__ void take(const void* from, std::int64_t at, float (&x)[V]) {
  const T* source = static_cast<const T*>(from) + at;
  if constexpr (V == 1) {
    x[0] = widen(*source);
  } else {
    using Wide = typename Word<sizeof(T) * V>::type;
    const Wide word = *reinterpret_cast<const Wide*>(source);
    T values[V];
    memcpy(values, &word, sizeof(word));
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = widen(values[v]);
  }
}

template <typename T, int V>
__device__ __forceinline__ void put(void* to, std::int64_t at, const float (&x)[V]) {
  T* target = static_cast<T*>(to) + at;
  if constexpr (V == 1) {
    *target = Narrow<T>::of(x[0]);
  } else {
    using Wide = typename Word<sizeof(T) * V>::type;
    T values[V];
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] = Narrow<T>::of(x[v]);
    Wide word;
    memcpy(&word, values, sizeof(word));
    *reinterpret_cast<Wide*>(target) = word;
  }
}

template <int O, int V>
__global__ __launch_bounds__(kThreads) void solver_route(const __grid_constant__ Step step,
                                                         const float* __restrict__ coefficients,
                                                         std::int64_t batch, std::int64_t n) {
  const std::int64_t pieces = n / V, total = batch * pieces;
  for (std::int64_t t = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; t < total;
       t += std::int64_t(gridDim.x) * kThreads) {
    const std::int64_t b = t / pieces, at = b * n + (t - b * pieces) * V;
    const float* c = coefficients + b * step.n_outputs * step.n_inputs;
    float acc[O][V];
#pragma unroll
    for (int o = 0; o < O; ++o)
#pragma unroll
      for (int v = 0; v < V; ++v) acc[o][v] = sum_start();
    for (int j = 0; j < step.n_inputs; ++j) {
      float each[1][O];
      bool any = false;
#pragma unroll
      for (int o = 0; o < O; ++o) {
        each[0][o] = o < step.n_outputs ? c[o * step.n_inputs + j] : 0.0f;
        any |= each[0][o] != 0.0f;
      }
      if (!any) continue;
      float x[V];
      switch (step.in_types[j]) {
        case kFloat16: take<Half, V>(step.inputs[j], at, x); break;
        case kBFloat16: take<Brain, V>(step.inputs[j], at, x); break;
        default: take<float, V>(step.inputs[j], at, x);
      }
      unsigned used = 0;
#pragma unroll
      for (int o = 0; o < O; ++o) used |= unsigned(each[0][o] != 0.0f) << o;
      accumulate<O, V>(acc, x, each[0], used);
    }
#pragma unroll
    for (int o = 0; o < O; ++o) {
      if (o >= step.n_outputs) continue;
      switch (step.out_types[o]) {
        case kFloat16: put<Half, V>(step.outputs[o], at, acc[o]); break;
        case kBFloat16: put<Brain, V>(step.outputs[o], at, acc[o]); break;
        default: put<float, V>(step.outputs[o], at, acc[o]);
      }
    }
  }
}

template <int O, int V>
int launch(const Step& step, const float* coefficients, std::int64_t batch, std::int64_t n,
           cudaStream_t stream) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const std::int64_t wanted = (batch * (n / V) + kThreads - 1) / kThreads;
  const std::int64_t most = std::int64_t(processors) * 8;
  solver_route<O, V><<<int(wanted < most ? wanted : most), kThreads, 0, stream>>>(
      step, coefficients, batch, n);
  return int(cudaGetLastError());
}

}  // namespace
}  // namespace searchlab

SL_API int sl_solver_update(const void* const* inputs, const int* in_types, int n_inputs,
                            const float* coefficients, void* const* outputs, const int* out_types,
                            int n_outputs, std::int64_t batch, std::int64_t n, void* stream) {
  using namespace searchlab;
  if (n_inputs < 1 || n_inputs > kMostInputs || n_outputs < 1 || n_outputs > kMostOutputs ||
      batch < 0 || n < 0)
    return -1;
  if (batch == 0 || n == 0) return 0;
  Step step{};
  step.n_inputs = n_inputs;
  step.n_outputs = n_outputs;
  std::uintptr_t bits = 0;
  for (int j = 0; j < n_inputs; ++j) {
    step.inputs[j] = inputs[j];
    step.in_types[j] = static_cast<signed char>(in_types[j]);
    bits |= reinterpret_cast<std::uintptr_t>(inputs[j]);
  }
  for (int o = 0; o < n_outputs; ++o) {
    step.outputs[o] = outputs[o];
    step.out_types[o] = static_cast<signed char>(out_types[o]);
    bits |= reinterpret_cast<std::uintptr_t>(outputs[o]);
  }
  const bool wide = bits % 16 == 0 && n % 4 == 0;
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (n_outputs == 1)
    return wide ? launch<1, 4>(step, coefficients, batch, n, on)
                : launch<1, 1>(step, coefficients, batch, n, on);
  if (n_outputs == 2)
    return wide ? launch<2, 4>(step, coefficients, batch, n, on)
                : launch<2, 1>(step, coefficients, batch, n, on);
  return wide ? launch<4, 4>(step, coefficients, batch, n, on)
              : launch<4, 1>(step, coefficients, batch, n, on);
}
