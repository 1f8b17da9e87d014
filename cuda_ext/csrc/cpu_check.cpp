// The element bodies compiled by g++: slow loops that tests compare with torch. Not part of the
// library that is loaded for work.
#include <vector>

#include "api.h"
#include "elements.h"

using namespace searchlab;

namespace {

template <typename T>
float read(const void* from, std::int64_t at) {
  return widen(static_cast<const T*>(from)[at]);
}

float read_any(const void* from, int type, std::int64_t at) {
  if (type == kFloat16) return read<Half>(from, at);
  if (type == kBFloat16) return read<Brain>(from, at);
  return read<float>(from, at);
}

void write_any(void* to, int type, std::int64_t at, float value) {
  if (type == kFloat16) static_cast<Half*>(to)[at] = Narrow<Half>::of(value);
  else if (type == kBFloat16) static_cast<Brain*>(to)[at] = Narrow<Brain>::of(value);
  else static_cast<float*>(to)[at] = value;
}

// What the lanes of a warp do in the matrix route, one after the other: the matrix instruction is
// written out as the sum that it stands for.
template <typename T>
void matrix_tile(const void* const* sources, int count, const float* c, int rows, int stride,
                 float* out /* (16, 64) */) {
  const int padded = (count + 15) / 16 * 16;
  for (int i = 0; i < 16 * 64; ++i) out[i] = 0.0f;
  std::vector<float> acc(32 * 8 * 4, 0.0f);
  std::vector<int> shift(16, 0);
  for (int p = 0; p < 16; ++p) {
    float largest = 0.0f;
    for (int k = 0; p < rows && k < count; ++k)
      largest = std::fmax(largest, std::fabs(c[p * stride + k]));
    shift[p] = split_shift(largest);
  }
  for (int k0 = 0; k0 < padded; k0 += 16)
    for (int s = 0; s < 3; ++s)
      for (int j = 0; j < 8; ++j) {
        // A (16, 16) and B (16, 8) as the lanes hold them.
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i)
            for (int half = 0; half < 2; ++half) {
              const int p = (lane >> 2) + (i & 1) * 8;
              const int local = (lane & 3) * 2 + (i >> 1) * 8 + half;
              T terms[3];
              const bool there = p < rows && k0 + local < count;
              split<T>(there ? c[p * stride + k0 + local] : 0.0f, shift[p], terms);
              a[p][local] = widen(terms[s]);
            }
          for (int i = 0; i < 4; ++i) {
            const int local = mma_source(lane, i), k = k0 + local;
            b[local][lane >> 2] =
                k < count ? read<T>(sources[k], mma_column(lane) + j) : 0.0f;
          }
        }
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i) {
            const int p = mma_row(lane, i), n = (lane & 3) * 2 + (i & 1);
            for (int k = 0; k < 16; ++k) acc[(lane * 8 + j) * 4 + i] += a[p][k] * b[k][n];
          }
      }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 8; ++j)
        out[mma_row(lane, i) * 64 + mma_first_column(lane, i) + j] =
            std::ldexp(acc[(lane * 8 + j) * 4 + i], -shift[mma_row(lane, i)]);
}

}  // namespace

SL_API int cpu_weighted_sum(const void* const* sources, int n_sources, const float* coefficients,
                            void* const* outputs, int n_outputs, const float* base,
                            std::int64_t n, int in_type, int out_type) {
  for (int p = 0; p < n_outputs; ++p) {
    const float* row = coefficients + std::int64_t(p) * n_sources;
    const int kind = row_kind(row, n_sources, in_type == out_type && base == nullptr);
    for (std::int64_t i = 0; i < n; ++i) {
      if (kind >= 0) {
        if (in_type == kFloat32)
          std::memcpy(static_cast<float*>(outputs[p]) + i,
                      static_cast<const float*>(sources[kind]) + i, 4);
        else
          static_cast<std::uint16_t*>(outputs[p])[i] =
              static_cast<const std::uint16_t*>(sources[kind])[i];
        continue;
      }
      float acc[1][1] = {{base ? base[i] : sum_start()}};
      if (kind == kEmpty && !base) acc[0][0] = 0.0f;
      for (int k = 0; k < n_sources; ++k) {
        if (row[k] == 0.0f) continue;
        const float x[1] = {read_any(sources[k], in_type, i)};
        accumulate<1, 1>(acc, x, row + k, 1u);
      }
      write_any(outputs[p], out_type, i, acc[0][0]);
    }
  }
  return 0;
}

SL_API int cpu_matrix_tile(const void* const* sources, int n_sources, const float* coefficients,
                           int n_outputs, float* out, int in_type) {
  if (in_type == kFloat16) matrix_tile<Half>(sources, n_sources, coefficients, n_outputs, n_sources, out);
  else if (in_type == kBFloat16) matrix_tile<Brain>(sources, n_sources, coefficients, n_outputs, n_sources, out);
  else return -1;
  return 0;
}

SL_API int cpu_solver_update(const void* const* inputs, const int* in_types, int n_inputs,
                             const float* coefficients, void* const* outputs, const int* out_types,
                             int n_outputs, std::int64_t batch, std::int64_t n) {
  for (std::int64_t b = 0; b < batch; ++b)
    for (int o = 0; o < n_outputs; ++o) {
      const float* c = coefficients + (b * n_outputs + o) * n_inputs;
      for (std::int64_t i = b * n; i < (b + 1) * n; ++i) {
        float acc[1][1] = {{sum_start()}};
        for (int j = 0; j < n_inputs; ++j) {
          if (c[j] == 0.0f) continue;
          const float x[1] = {read_any(inputs[j], in_types[j], i)};
          accumulate<1, 1>(acc, x, c + j, 1u);
        }
        write_any(outputs[o], out_types[o], i, acc[0][0]);
      }
    }
  return 0;
}

SL_API int cpu_round_trip(const float* values, std::int64_t n, int type, float* out) {
  for (std::int64_t i = 0; i < n; ++i)
    out[i] = type == kFloat16 ? widen(Narrow<Half>::of(values[i])) : widen(Narrow<Brain>::of(values[i]));
  return 0;
}

SL_API int cpu_order(const float* values, int n, std::int64_t* out) {
  std::vector<bool> taken(n, false);
  for (int r = 0; r < n; ++r) {
    int best = -1;
    for (int i = 0; i < n; ++i)
      if (!taken[i] && (best < 0 || ahead(values[i], i, values[best], best))) best = i;
    taken[best] = true;
    out[r] = best;
  }
  return 0;
}
