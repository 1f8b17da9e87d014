// The functions of the library, in C: pointers, sizes and a stream, no type of torch or Python.
#pragma once

#include <cstdint>

#ifdef _WIN32
#define SL_API extern "C" __declspec(dllexport)
#else
#define SL_API extern "C" __attribute__((visibility("default")))
#endif

// Storage types.
constexpr int kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2;

constexpr int kMaxSources = 448;  // of one call: their addresses travel with the launch
constexpr int kMaxOutputs = 32;   // of one launch

// Results: 0, or a cudaError_t, or -1 for arguments that no kernel serves.
SL_API int sl_version();
SL_API int sl_device_count();

// outputs[p][i] = base[i] + sum over k of coefficients[p][k] * sources[k][i], i < n.
// `sources` and `outputs` are host arrays of device addresses; coefficients are on the device.
SL_API int sl_weighted_sum(const void* const* sources, int n_sources, const float* coefficients,
                           void* const* outputs, int n_outputs, const float* base,
                           std::int64_t n, int in_type, int out_type, int tensor_cores,
                           void* stream);

// outputs[o][b, i] = sum over j of coefficients[b][o][j] * inputs[j][b, i], i < n.
SL_API int sl_solver_update(const void* const* inputs, const int* in_types, int n_inputs,
                            const float* coefficients, void* const* outputs, const int* out_types,
                            int n_outputs, std::int64_t batch, std::int64_t n, void* stream);

// Softmax of logits (tokens, experts), masked or mapped, and the k greatest of each row.
SL_API int sl_route_topk(const void* logits, int in_type, std::int64_t tokens, int experts,
                         const std::uint8_t* masks, const float* maps, int mapped, int map_logits,
                         const std::int64_t* rows, int k, int renormalise, float* weights,
                         std::int64_t* indices, void* stream);
