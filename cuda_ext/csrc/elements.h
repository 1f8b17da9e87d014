// What one element, one lane or one row does: shared by the kernels and by a CPU build that is
// tested where there is no GPU. No launch, no thread index and no intrinsic that g++ lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SL_BODY __host__ __device__ __forceinline__
#define SL_UNROLL _Pragma("unroll")
#else
#define SL_BODY inline
#define SL_UNROLL
#endif

namespace searchlab {

// Storage types by their bits, so that g++ needs no CUDA header.
struct Half {
  std::uint16_t bits;
};
struct Brain {
  std::uint16_t bits;
};

SL_BODY float bits_to_float(std::uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

SL_BODY std::uint32_t float_to_bits(float value) {
  std::uint32_t out;
  std::memcpy(&out, &value, 4);
  return out;
}

SL_BODY float widen(float value) { return value; }

SL_BODY float widen(Brain value) { return bits_to_float(std::uint32_t(value.bits) << 16); }

SL_BODY float widen(Half value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  const std::uint32_t sign = std::uint32_t(value.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (value.bits >> 10) & 0x1Fu;
  const std::uint32_t mantissa = value.bits & 0x3FFu;
  if (exponent == 0x1F) return bits_to_float(sign | 0x7F800000u | (mantissa << 13));
  if (exponent) return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float small = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -small : small;
#endif
}

template <typename T>
struct Narrow;

template <>
struct Narrow<float> {
  static SL_BODY float of(float value) { return value; }
};

// Rounds to nearest, ties to even; NaN stays NaN.
template <>
struct Narrow<Brain> {
  static SL_BODY Brain of(float value) {
#ifdef __CUDA_ARCH__
    return Brain{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    const std::uint32_t bits = float_to_bits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return Brain{0x7FFF};
    return Brain{std::uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
#endif
  }
};

template <>
struct Narrow<Half> {
  static SL_BODY Half of(float value) {
#ifdef __CUDA_ARCH__
    return Half{__half_as_ushort(__float2half_rn(value))};
#else
    const std::uint32_t bits = float_to_bits(value);
    const std::uint16_t sign = std::uint16_t((bits >> 16) & 0x8000u);
    const std::uint32_t size = bits & 0x7FFFFFFFu;
    if (size > 0x7F800000u) return Half{0x7FFF};
    if (size >= 0x477FF000u) return Half{std::uint16_t(sign | 0x7C00u)};  // 65520 and above
    if (size < 0x38800000u) {  // below 2^-14: steps of 2^-24, and rintf rounds ties to even
      const float steps = std::rint(bits_to_float(size) * 16777216.0f);
      return Half{std::uint16_t(sign | std::uint16_t(steps))};
    }
    const std::uint32_t rounded = size + 0xFFFu + ((size >> 13) & 1u);
    return Half{std::uint16_t(sign | std::uint16_t((rounded - 0x38000000u) >> 13))};
#endif
  }
};

SL_BODY float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return fmaf(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// -- weighted sums --------------------------------------------------------------------------------

// What a row of coefficients asks for.
constexpr int kMixed = -1;  // a sum
constexpr int kEmpty = -2;  // nothing but zeros; otherwise: the only source, taken as it is

SL_BODY int row_kind(const float* row, int count, bool copies) {
  int kind = kEmpty;
  for (int k = 0; k < count; ++k) {
    if (row[k] == 0.0f) continue;
    if (kind != kEmpty || row[k] != 1.0f || !copies) return kMixed;
    kind = k;
  }
  return kind;
}

// A sum starts at -0, which leaves every first term as it is, -0 included.
SL_BODY float sum_start() { return bits_to_float(0x80000000u); }

// acc[p][v] += c[p] * x[v] wherever bit p of `used` says that c[p] is not zero.
template <int P, int V>
SL_BODY void accumulate(float (&acc)[P][V], const float (&x)[V], const float* c, unsigned used) {
  constexpr unsigned all = P == 32 ? ~0u : (1u << P) - 1u;
  if (used == all) {
  SL_UNROLL
    for (int p = 0; p < P; ++p)
      SL_UNROLL
      for (int v = 0; v < V; ++v) acc[p][v] = fused(c[p], x[v], acc[p][v]);
    return;
  }
  SL_UNROLL
  for (int p = 0; p < P; ++p) {
    if (!((used >> p) & 1u)) continue;
  SL_UNROLL
    for (int v = 0; v < V; ++v) acc[p][v] = fused(c[p], x[v], acc[p][v]);
  }
}

// -- tensor cores: who holds what in mma.m16n8k16 (row, col) --------------------------------------

// A lane's sources in a step of 16, its 8 columns of 64, and the rows and columns of its results.
// Column n of tile j stands for column 8 n + j of the 64, so that a lane reads and writes 8
// neighbouring elements at a time.
SL_BODY int mma_source(int lane, int i) { return (lane & 3) * 2 + (i & 1) + (i >> 1) * 8; }
SL_BODY int mma_column(int lane) { return (lane >> 2) * 8; }
SL_BODY int mma_row(int lane, int i) { return (lane >> 2) + (i >> 1) * 8; }
SL_BODY int mma_first_column(int lane, int i) { return ((lane & 3) * 2 + (i & 1)) * 8; }

// A coefficient as three numbers of the storage type whose sum holds 24 bits of it; `shift` moves
// the largest of a row to the upper end of fp16's range, where its small terms are not lost.
template <typename T>
SL_BODY void split(float value, int shift, T (&terms)[3]) {
  float rest = std::ldexp(value, shift);
  for (int i = 0; i < 3; ++i) {
    terms[i] = Narrow<T>::of(rest);
    rest -= widen(terms[i]);
  }
}

SL_BODY int split_shift(float largest) {
  if (!(largest > 0.0f) || !std::isfinite(largest)) return 0;
  int exponent = 0;
  std::frexp(largest, &exponent);
  return 14 - exponent;
}

// Whether one of the two numbers in a word is infinite or no number.
SL_BODY bool special(std::uint32_t word, Brain) {
  return (word & 0x7F80u) == 0x7F80u || (word & 0x7F800000u) == 0x7F800000u;
}
SL_BODY bool special(std::uint32_t word, Half) {
  return (word & 0x7C00u) == 0x7C00u || (word & 0x7C000000u) == 0x7C000000u;
}

// -- routing --------------------------------------------------------------------------------------

// The order of a top-k: greater first, the lower index where equal; NaN before all, as in torch.
SL_BODY bool ahead(float a, int i, float b, int j) {
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan != b_nan) return a_nan;
  if (a_nan || a == b) return i < j;
  return a > b;
}

}  // namespace searchlab
