// Loads and stores of 16 bytes, or of single elements where addresses are not aligned.
#pragma once

#include "elements.h"

namespace searchlab {

// V elements of one type as they lie in memory.
template <typename T, int V>
struct Vector {
  static constexpr int kWords = V * int(sizeof(T)) / 16;
  static_assert(V == 1 || kWords >= 1, "whole vectors of 16 bytes, or single elements");
  T values[V];

  __device__ __forceinline__ void load(const T* from) {
    if constexpr (V == 1) {
      values[0] = *from;
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint4 word = __ldcs(reinterpret_cast<const uint4*>(from) + w);
        memcpy(reinterpret_cast<char*>(values) + w * 16, &word, 16);
      }
    }
  }

  __device__ __forceinline__ void widened(float (&out)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = widen(values[v]);
  }

  // The bits themselves; only where the types are the same.
  template <typename Out>
  __device__ __forceinline__ void store_bits(Out* to) const {
    if constexpr (sizeof(Out) == sizeof(T)) {
      if constexpr (V == 1) {
        memcpy(to, values, sizeof(T));
      } else {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          uint4 word;
          memcpy(&word, reinterpret_cast<const char*>(values) + w * 16, 16);
          __stcs(reinterpret_cast<uint4*>(to) + w, word);
        }
      }
    }
  }
};

template <int V>
__device__ __forceinline__ void load_floats(const float* from, float (&out)[V]) {
  if constexpr (V == 1) {
    out[0] = *from;
  } else {
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      const float4 word = __ldcs(reinterpret_cast<const float4*>(from + v));
      out[v] = word.x;
      out[v + 1] = word.y;
      out[v + 2] = word.z;
      out[v + 3] = word.w;
    }
  }
}

template <typename Out, int V>
__device__ __forceinline__ void store_floats(Out* to, const float (&in)[V]) {
  if constexpr (V == 1) {
    *to = Narrow<Out>::of(in[0]);
  } else if constexpr (sizeof(Out) == 4) {
#pragma unroll
    for (int v = 0; v < V; v += 4)
      __stcs(reinterpret_cast<float4*>(to + v), make_float4(in[v], in[v + 1], in[v + 2], in[v + 3]));
  } else {
    Vector<Out, V> packed;
#pragma unroll
    for (int v = 0; v < V; ++v) packed.values[v] = Narrow<Out>::of(in[v]);
    packed.store_bits(to);
  }
}

// Elements from i on, as T, or as float32 where `wide` says that the results are wider than T.
template <typename T, int V>
__device__ __forceinline__ void store_as(void* to, std::int64_t i, const float (&in)[V],
                                         bool wide) {
  if (sizeof(T) == 4 || wide)
    store_floats<float, V>(static_cast<float*>(to) + i, in);
  else
    store_floats<T, V>(static_cast<T*>(to) + i, in);
}

}  // namespace searchlab
