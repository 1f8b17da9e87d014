// Weighted sums of tensors at scattered addresses: every source is read once for up to 8 (or, with
// tensor cores, 32) results.
#include <cuda_runtime.h>

#include "api.h"
#include "elements.h"
#include "vectors.cuh"

namespace searchlab {
namespace {

struct Sources {
  const void* at[kMaxSources];
};
struct Outputs {
  void* at[kMaxOutputs];
};

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // loads in flight before the first is used

template <typename In, int P, int V>
__global__ __launch_bounds__(kThreads) void scalar_route(
    const __grid_constant__ Sources sources, const __grid_constant__ Outputs outputs,
    const float* __restrict__ coefficients, int stride, int count, int used_rows,
    const float* __restrict__ base, std::int64_t begin, std::int64_t end, bool wide) {
  extern __shared__ float shared[];
  float* c = shared;                                                      // (count, P)
  unsigned* used = reinterpret_cast<unsigned*>(shared + count * P);       // (count,)
  int* kind = reinterpret_cast<int*>(used + count);                       // (P,)
  for (int i = threadIdx.x; i < count * P; i += kThreads) {
    const int k = i / P, p = i % P;
    c[i] = p < used_rows ? coefficients[std::int64_t(p) * stride + k] : 0.0f;
  }
  if (threadIdx.x < P)
    kind[threadIdx.x] =
        int(threadIdx.x) < used_rows
            ? row_kind(coefficients + std::int64_t(threadIdx.x) * stride, count,
                       !wide && base == nullptr)
            : kEmpty;
  __syncthreads();
  for (int k = threadIdx.x; k < count; k += kThreads) {
    unsigned bits = 0;
    for (int p = 0; p < P; ++p) bits |= unsigned(c[k * P + p] != 0.0f) << p;
    used[k] = bits;
  }
  __syncthreads();

  const std::int64_t step = std::int64_t(gridDim.x) * kThreads * V;
  for (std::int64_t i = begin + (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) * V; i < end;
       i += step) {
    float acc[P][V];
    float start[V];
    if (base != nullptr) {
      load_floats<V>(base + i, start);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) start[v] = sum_start();
    }
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int v = 0; v < V; ++v) acc[p][v] = start[v];

    for (int k = 0; k < count; k += kUnroll) {
      Vector<In, V> raw[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (k + u < count && used[k + u])
          raw[u].load(static_cast<const In*>(sources.at[k + u]) + i);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (k + u < count && used[k + u]) {
          float x[V];
          raw[u].widened(x);
          accumulate<P, V>(acc, x, c + (k + u) * P, used[k + u]);
        }
    }
#pragma unroll
    for (int p = 0; p < P; ++p) {
      if (p >= used_rows) continue;
      if (kind[p] >= 0) {
        Vector<In, V> raw;
        raw.load(static_cast<const In*>(sources.at[kind[p]]) + i);
        raw.store_bits(static_cast<In*>(outputs.at[p]) + i);
        continue;
      }
      if (kind[p] == kEmpty && base == nullptr)
#pragma unroll
        for (int v = 0; v < V; ++v) acc[p][v] = 0.0f;
      store_as<In, V>(outputs.at[p], i, acc[p], wide);
    }
  }
}

__device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1, Brain) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1, Half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A warp makes 16 * M rows of 64 columns; sources go from memory to registers, in the order in
// which the matrix instruction wants them, and never through shared memory.
template <typename In, int M>
__global__ __launch_bounds__(kThreads) void matrix_route(
    const __grid_constant__ Sources sources, const __grid_constant__ Outputs outputs,
    const float* __restrict__ coefficients, int stride, int count, int used_rows,
    const float* __restrict__ base, std::int64_t tiles, bool wide) {
  constexpr int kRows = 16 * M;
  extern __shared__ float shared[];
  const int padded = (count + 15) / 16 * 16;
  const int pitch = padded + 8;  // a row of 4 more words: eight rows then lie in all 32 banks
  float* scale = shared;                                                  // (kRows,)
  int* kind = reinterpret_cast<int*>(scale + kRows);                      // (kRows,)
  In* terms = reinterpret_cast<In*>(kind + kRows);                        // (3, kRows, pitch)
  if (threadIdx.x < kRows) {
    const int p = threadIdx.x;
    float largest = 0.0f;
    for (int k = 0; p < used_rows && k < count; ++k)
      largest = fmaxf(largest, fabsf(coefficients[std::int64_t(p) * stride + k]));
    const int shift = split_shift(largest);
    kind[p] = p < used_rows ? row_kind(coefficients + std::int64_t(p) * stride, count,
                                       !wide && base == nullptr)
                            : kEmpty;
    scale[p] = ldexpf(1.0f, -shift);
    for (int k = 0; k < padded; ++k) {
      In parts[3];
      const bool there = p < used_rows && k < count;
      split<In>(there ? coefficients[std::int64_t(p) * stride + k] : 0.0f, shift, parts);
      for (int s = 0; s < 3; ++s) terms[(s * kRows + p) * pitch + k] = parts[s];
    }
  }
  __syncthreads();

  const int lane = threadIdx.x & 31;
  const std::int64_t warps = std::int64_t(gridDim.x) * (kThreads / 32);
  for (std::int64_t tile = std::int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
       tile < tiles; tile += warps) {
    const std::int64_t at = tile * 64;
    float acc[M][8][4];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][j][i] = 0.0f;

    bool odd = false;
    uint4 next[4];
    auto fetch = [&](int k0, uint4(&words)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = k0 + mma_source(lane, i);
        words[i] = k < count ? __ldcs(reinterpret_cast<const uint4*>(
                                   static_cast<const In*>(sources.at[k]) + at + mma_column(lane)))
                             : make_uint4(0, 0, 0, 0);
      }
    };
    fetch(0, next);
    for (int k0 = 0; k0 < padded; k0 += 16) {
      std::uint32_t row[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        row[i][0] = next[i].x;
        row[i][1] = next[i].y;
        row[i][2] = next[i].z;
        row[i][3] = next[i].w;
      }
      if (k0 + 16 < padded) fetch(k0 + 16, next);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int w = 0; w < 4; ++w) odd |= special(row[i][w], In{});
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int s = 0; s < 3; ++s) {
          std::uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // a0, a1: rows g and g + 8 at the lane's first sources; a2, a3: at the ones 8 further.
            const int p = m * 16 + (lane >> 2) + (i & 1) * 8;
            const int k = k0 + (lane & 3) * 2 + (i >> 1) * 8;
            a[i] = *reinterpret_cast<const std::uint32_t*>(&terms[(s * kRows + p) * pitch + k]);
          }
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            mma(acc[m][2 * w], a, __byte_perm(row[0][w], row[1][w], 0x5410),
                __byte_perm(row[2][w], row[3][w], 0x5410), In{});
            mma(acc[m][2 * w + 1], a, __byte_perm(row[0][w], row[1][w], 0x7632),
                __byte_perm(row[2][w], row[3][w], 0x7632), In{});
          }
        }
    }
    odd = __any_sync(0xFFFFFFFFu, odd);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int p = m * 16 + mma_row(lane, i);
        if (p >= used_rows) continue;
        const std::int64_t first = at + mma_first_column(lane, i);
        if (kind[p] >= 0) {
          Vector<In, 8> raw;
          raw.load(static_cast<const In*>(sources.at[kind[p]]) + first);
          raw.store_bits(static_cast<In*>(outputs.at[p]) + first);
          continue;
        }
        float start[8], value[8];
        if (base != nullptr) load_floats<8>(base + first, start);
        if (odd) {
          // 0 * inf, and the parts of one coefficient times inf, are not what was asked for.
#pragma unroll
          for (int j = 0; j < 8; ++j) value[j] = base != nullptr ? start[j] : sum_start();
          for (int k = 0; k < count; ++k) {
            const float c = coefficients[std::int64_t(p) * stride + k];
            if (c == 0.0f) continue;
            float x[8];
            Vector<In, 8> raw;
            raw.load(static_cast<const In*>(sources.at[k]) + first);
            raw.widened(x);
#pragma unroll
            for (int j = 0; j < 8; ++j) value[j] = fused(c, x[j], value[j]);
          }
        } else {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            value[j] = acc[m][j][i] * scale[p];
            if (base != nullptr) value[j] += start[j];
          }
        }
        if (kind[p] == kEmpty && base == nullptr)
#pragma unroll
          for (int j = 0; j < 8; ++j) value[j] = 0.0f;
        store_as<In, 8>(outputs.at[p], first, value, wide);
      }
  }
}

template <typename Kernel>
int blocks_for(Kernel kernel, std::size_t shared, std::int64_t wanted) {
  int device = 0, processors = 1, each = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, shared);
  const std::int64_t most = std::int64_t(processors) * (each > 0 ? each : 1);
  return int(wanted < most ? wanted : most);
}

struct Call {
  Sources sources;
  int count;
  const float* coefficients;
  const float* base;
  bool wide;  // results are float32, and the sources are not
  cudaStream_t stream;
};

template <typename In, int P, int V>
int launch_scalar(const Call& call, const Outputs& outputs, int row, int rows, std::int64_t begin,
                  std::int64_t end) {
  if (begin >= end) return 0;
  const std::size_t shared = std::size_t(call.count) * (P + 1) * 4 + P * 4;
  auto kernel = scalar_route<In, P, V>;
  const std::int64_t wanted = ((end - begin) / V + kThreads - 1) / kThreads;
  kernel<<<blocks_for(kernel, shared, wanted), kThreads, shared, call.stream>>>(
      call.sources, outputs, call.coefficients + std::int64_t(row) * call.count, call.count,
      call.count, rows, call.base, begin, end, call.wide);
  return int(cudaGetLastError());
}

template <typename In, int V>
int scalar_rows(const Call& call, void* const* outputs, int row, int rows, std::int64_t begin,
                std::int64_t end) {
  for (int done = 0; done < rows;) {
    const int left = rows - done;
    const int now = left >= 8 ? 8 : left;
    Outputs to{};
    for (int p = 0; p < now; ++p) to.at[p] = outputs[row + done + p];
    int error;
    if (now == 1)
      error = launch_scalar<In, 1, V>(call, to, row + done, now, begin, end);
    else if (V == 1 || now > 4)  // single elements are tails: two variants of them are enough
      error = launch_scalar<In, 8, V>(call, to, row + done, now, begin, end);
    else if constexpr (V > 1)
      error = now > 2 ? launch_scalar<In, 4, V>(call, to, row + done, now, begin, end)
                      : launch_scalar<In, 2, V>(call, to, row + done, now, begin, end);
    else
      error = -1;
    if (error) return error;
    done += now;
  }
  return 0;
}

template <typename In, int M>
int launch_matrix(const Call& call, void* const* outputs, int row, int rows, std::int64_t tiles) {
  constexpr int kRows = 16 * M;
  Outputs to{};
  for (int p = 0; p < rows; ++p) to.at[p] = outputs[row + p];
  const int pitch = (call.count + 15) / 16 * 16 + 8;
  const std::size_t shared = kRows * 8 + std::size_t(3) * kRows * pitch * sizeof(In);
  auto kernel = matrix_route<In, M>;
  cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         int(shared));
  if (set != cudaSuccess) return int(set);
  const std::int64_t wanted = (tiles + kThreads / 32 - 1) / (kThreads / 32);
  kernel<<<blocks_for(kernel, shared, wanted), kThreads, shared, call.stream>>>(
      call.sources, to, call.coefficients + std::int64_t(row) * call.count, call.count, call.count,
      rows, call.base, tiles, call.wide);
  return int(cudaGetLastError());
}

bool aligned(const Call& call, void* const* outputs, int rows) {
  std::uintptr_t bits = reinterpret_cast<std::uintptr_t>(call.base);
  for (int k = 0; k < call.count; ++k)
    bits |= reinterpret_cast<std::uintptr_t>(call.sources.at[k]);
  for (int p = 0; p < rows; ++p) bits |= reinterpret_cast<std::uintptr_t>(outputs[p]);
  return bits % 16 == 0;
}

template <typename In>
int run(const Call& call, void* const* outputs, int rows, std::int64_t n, bool tensor_cores) {
  constexpr int V = 16 / sizeof(In);
  if (!aligned(call, outputs, rows)) return scalar_rows<In, 1>(call, outputs, 0, rows, 0, n);
  int row = 0;
  if constexpr (sizeof(In) == 2) {
    // Three matrix products per coefficient still wait for memory; for few rows they gain nothing.
    while (tensor_cores && rows - row > 8 && n >= 64) {
      const int now = rows - row >= kMaxOutputs ? kMaxOutputs : rows - row;
      const int error = launch_matrix<In, 2>(call, outputs, row, now, n / 64);
      if (error) return error;
      const std::int64_t done = n / 64 * 64;
      const int tail = scalar_rows<In, 1>(call, outputs, row, now, done, n);
      if (tail) return tail;
      row += now;
    }
  }
  const std::int64_t whole = n / V * V;
  const int error = scalar_rows<In, V>(call, outputs, row, rows - row, 0, whole);
  if (error) return error;
  return scalar_rows<In, 1>(call, outputs, row, rows - row, whole, n);
}

}  // namespace
}  // namespace searchlab

SL_API int sl_weighted_sum(const void* const* sources, int n_sources, const float* coefficients,
                           void* const* outputs, int n_outputs, const float* base,
                           std::int64_t n, int in_type, int out_type, int tensor_cores,
                           void* stream) {
  using namespace searchlab;
  if (n_sources < 1 || n_sources > kMaxSources || n_outputs < 1 || n < 0) return -1;
  if (out_type != kFloat32 && out_type != in_type) return -1;
  Call call{{}, n_sources, coefficients, base, out_type != in_type,
            static_cast<cudaStream_t>(stream)};
  for (int k = 0; k < n_sources; ++k) call.sources.at[k] = sources[k];
  const bool matrix = tensor_cores != 0;
  if (in_type == kFloat32) return run<float>(call, outputs, n_outputs, n, matrix);
  if (in_type == kFloat16) return run<Half>(call, outputs, n_outputs, n, matrix);
  if (in_type == kBFloat16) return run<Brain>(call, outputs, n_outputs, n, matrix);
  return -1;
}

SL_API int sl_version() { return 1; }

SL_API int sl_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}
