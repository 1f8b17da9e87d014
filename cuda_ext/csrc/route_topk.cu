// The router of a mixture of experts in one pass: softmax, mask or map, top-k, renormalisation.
// A warp per token; every token may have a mask or a map of its own.
#include <cuda_runtime.h>

#include "api.h"
#include "elements.h"

namespace searchlab {
namespace {

constexpr int kWarps = 4;

__device__ __forceinline__ float most(float value) {
#pragma unroll
  for (int d = 16; d; d /= 2) {
    const float other = __shfl_xor_sync(0xFFFFFFFFu, value, d);
    value = (other > value || other != other) ? other : value;
  }
  return value;
}

__device__ __forceinline__ float total(float value) {
#pragma unroll
  for (int d = 16; d; d /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, d);
  return value;
}

template <int S>
__device__ __forceinline__ void softmax(float (&z)[S], int lane, int experts) {
  float top = bits_to_float(0xFF800000u);
#pragma unroll
  for (int s = 0; s < S; ++s)
    if (lane + 32 * s < experts) top = (z[s] > top || z[s] != z[s]) ? z[s] : top;
  top = most(top);
  float sum = 0.0f;
#pragma unroll
  for (int s = 0; s < S; ++s) {
    z[s] = lane + 32 * s < experts ? expf(z[s] - top) : 0.0f;
    sum += z[s];
  }
  sum = total(sum);
#pragma unroll
  for (int s = 0; s < S; ++s) z[s] /= sum;
}

// out[j] = sum over i of map[j][i] * in[i]; `in` travels through shared memory.
template <int S>
__device__ __forceinline__ void apply_map(float (&z)[S], const float* map, float* shared, int lane,
                                          int experts, int mapped) {
#pragma unroll
  for (int s = 0; s < S; ++s)
    if (lane + 32 * s < experts) shared[lane + 32 * s] = z[s];
  __syncwarp();
#pragma unroll
  for (int s = 0; s < S; ++s) {
    const int j = lane + 32 * s;
    float sum = 0.0f;
    if (j < mapped)
      for (int i = 0; i < experts; ++i) {
        const float c = map[std::int64_t(j) * experts + i];
        if (c != 0.0f) sum = fused(c, shared[i], sum);
      }
    z[s] = sum;
  }
  __syncwarp();
}

// A token's logits, each lane every 32nd; what the mask leaves out is minus infinity.
template <typename In, int S>
__device__ __forceinline__ void take(const void* logits, std::int64_t token, int lane, int experts,
                                     const std::uint8_t* mask, float (&z)[S]) {
  const In* from = static_cast<const In*>(logits) + token * experts;
#pragma unroll
  for (int s = 0; s < S; ++s) {
    const int i = lane + 32 * s;
    z[s] = bits_to_float(0xFF800000u);
    if (i < experts && (mask == nullptr || mask[i])) z[s] = widen(from[i]);
  }
}

template <int S>
__global__ __launch_bounds__(32 * kWarps) void route(
    const void* __restrict__ logits, int in_type, std::int64_t tokens, int experts,
    const std::uint8_t* __restrict__ masks, const float* __restrict__ maps, int mapped,
    bool map_logits, const std::int64_t* __restrict__ rows, int k, bool renormalise,
    float* __restrict__ weights, std::int64_t* __restrict__ indices) {
  extern __shared__ float shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  float* mine = shared + warp * experts;
  for (std::int64_t t = std::int64_t(blockIdx.x) * kWarps + warp; t < tokens;
       t += std::int64_t(gridDim.x) * kWarps) {
    const std::int64_t candidate = rows != nullptr ? rows[t] : 0;
    const std::uint8_t* mask = masks != nullptr ? masks + candidate * experts : nullptr;
    float z[S];
    switch (in_type) {
      case kFloat16: take<Half, S>(logits, t, lane, experts, mask, z); break;
      case kBFloat16: take<Brain, S>(logits, t, lane, experts, mask, z); break;
      default: take<float, S>(logits, t, lane, experts, mask, z);
    }
    int width = experts;
    if (maps != nullptr) {
      const float* map = maps + candidate * mapped * experts;
      width = mapped;
      if (map_logits) {
        apply_map<S>(z, map, mine, lane, experts, mapped);
        softmax<S>(z, lane, mapped);
      } else {
        softmax<S>(z, lane, experts);
        apply_map<S>(z, map, mine, lane, experts, mapped);
#pragma unroll
        for (int s = 0; s < S; ++s) z[s] = z[s] < 0.0f ? 0.0f : z[s];
      }
    } else {
      softmax<S>(z, lane, experts);
    }

    float chosen = 0.0f, sum = 0.0f;  // lane r holds the r-th, for r < 32
    std::int64_t chosen_index = 0;
    unsigned taken = 0;
    for (int r = 0; r < k; ++r) {
      float best = 0.0f;
      int index = 1 << 30;
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const int i = lane + 32 * s;
        if (i >= width || ((taken >> s) & 1u)) continue;
        if (index == 1 << 30 || ahead(z[s], i, best, index)) {
          best = z[s];
          index = i;
        }
      }
#pragma unroll
      for (int d = 16; d; d /= 2) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, best, d);
        const int other_index = __shfl_xor_sync(0xFFFFFFFFu, index, d);
        if (other_index == 1 << 30) continue;
        if (index == 1 << 30 || ahead(other, other_index, best, index)) {
          best = other;
          index = other_index;
        }
      }
      if ((index & 31) == lane) taken |= 1u << (index / 32);
      sum += best;
      if (lane == r) {
        chosen = best;
        chosen_index = index;
      }
    }
    if (renormalise) chosen /= fmaxf(sum, 1e-20f);
    if (lane < k) {
      weights[t * k + lane] = chosen;
      indices[t * k + lane] = chosen_index;
    }
  }
}

struct Arguments {
  const void* logits;
  int in_type;
  std::int64_t tokens;
  int experts;
  const std::uint8_t* masks;
  const float* maps;
  int mapped;
  bool map_logits;
  const std::int64_t* rows;
  int k;
  bool renormalise;
  float* weights;
  std::int64_t* indices;
  cudaStream_t stream;
};

template <int S>
int launch(const Arguments& a) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const std::int64_t wanted = (a.tokens + kWarps - 1) / kWarps, top = std::int64_t(processors) * 32;
  const std::size_t shared = a.maps != nullptr ? std::size_t(kWarps) * a.experts * 4 : 0;
  route<S><<<int(wanted < top ? wanted : top), 32 * kWarps, shared, a.stream>>>(
      a.logits, a.in_type, a.tokens, a.experts, a.masks, a.maps, a.mapped,
      a.map_logits, a.rows, a.k, a.renormalise, a.weights, a.indices);
  return int(cudaGetLastError());
}

int sized(const Arguments& a) {
  const int widest = a.mapped > a.experts ? a.mapped : a.experts;
  if (widest <= 32) return launch<1>(a);
  if (widest <= 64) return launch<2>(a);
  if (widest <= 128) return launch<4>(a);
  if (widest <= 256) return launch<8>(a);
  return launch<16>(a);
}

}  // namespace
}  // namespace searchlab

SL_API int sl_route_topk(const void* logits, int in_type, std::int64_t tokens, int experts,
                         const std::uint8_t* masks, const float* maps, int mapped, int map_logits,
                         const std::int64_t* rows, int k, int renormalise, float* weights,
                         std::int64_t* indices, void* stream) {
  using namespace searchlab;
  const int width = maps != nullptr ? mapped : experts;
  if (experts < 1 || experts > 512 || width > 512 || k < 1 || k > 32 || k > width || tokens < 0)
    return -1;
  if (tokens == 0) return 0;
  if (in_type != kFloat32 && in_type != kFloat16 && in_type != kBFloat16) return -1;
  const Arguments a{logits, in_type, tokens, experts, masks, maps, mapped, map_logits != 0, rows, k,
                    renormalise != 0, weights, indices, static_cast<cudaStream_t>(stream)};
  return sized(a);
}
