// What the bindings share: torch's stable ABI, checks of tensors, and how a call runs on the CPU and on CUDA.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "philox.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What the first check that failed on this thread said, until qirl_take_error hands it on. One for each library.
inline thread_local std::string last_error;

inline void append(const char* part) { last_error += part; }
inline void append(int64_t part) { last_error += std::to_string(part); }

// Keeps the message of the first check that fails; kernels/_native.py raises it after the call. Nothing of csrc throws:
// where the compiler's run-time library is not the one that torch runs with, a throw can end the process.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok && last_error.empty()) (append(parts), ...);
}
inline bool refused() { return !last_error.empty(); }

#ifdef QIRL_CUDA
using cudaStream_t = struct CUstream_st*;
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

// launch(call, stream) on the device and the current stream of `like`.
template <class Call>
void on_cuda(const Call& call, const Tensor& like, const char* (*launch)(const Call*, cudaStream_t)) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  const char* error = launch(&call, static_cast<cudaStream_t>(stream));
  check(error == nullptr, "qirl on CUDA: ", error ? error : "");
}
#else
// unit(i) for all i below `count`, over torch's threads, `grain` at a time; `message` where one returns false.
template <class Unit>
void on_cpu(int64_t count, int64_t grain, const char* message, Unit unit) {
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    // A copy that nothing else can write, of a unit that holds its call by value: only then are elements vectorised.
    const Unit own = unit;
    bool all = true;
    for (int64_t i = begin; i < end; ++i) all &= own(i);
    if (!all) ok = false;
  });
  check(ok, message);
}
#endif

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype = ScalarType::Float) {
  return torch::stable::new_empty(like, std::vector<int64_t>(size), dtype);
}

// 0 where there is no such dimension: a check may ask before it is known that there is.
inline int64_t size(const Tensor& t, int64_t dim) { return dim < t.dim() ? t.size(dim) : 0; }

namespace {

// What a refused call returns: tensors without elements.
struct Nothing {
  const Tensor& like;
  operator Tensor() const { return empty(like, {0}); }
  template <class... T>
  operator std::tuple<T...>() const {
    return {static_cast<T>(*this)...};
  }
};

// Pointers of tensors that must lie beside `like`, in its device; of no use once a check has failed.
struct Beside {
  const Tensor& like;

  template <class T>
  T* of(const Tensor& t, const char* name, ScalarType dtype, int64_t dim) const {
    check(t.scalar_type() == dtype, name, " has another dtype than this op takes");
    check(t.dim() == dim && t.is_contiguous(), name, " must be contiguous with ", dim, " dimension(s)");
    check(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), name,
          " is on another device than the first tensor");
    return static_cast<T*>(t.data_ptr());
  }
  const int64_t* integers(const Tensor& t, const char* name, int64_t dim = 1) const {
    check(t.scalar_type() == ScalarType::Long && t.dim() == dim && t.is_contiguous(), name,
          " must be contiguous int64 with ", dim, " dimension(s)");
    return of<int64_t>(t, name, ScalarType::Long, dim);
  }
  float* floats(const Tensor& t, const char* name, int64_t dim = 1) const {
    return of<float>(t, name, ScalarType::Float, dim);
  }
};

}  // namespace

// The draws of rows; counters are int64 [R], token int64 [N]; word: of all rows where there is no step_word.
inline qirl::Noise noise_of(const Tensor& like, int64_t seed, const Tensor& prompt, const Tensor& sample_word,
                            const std::optional<Tensor>& step_word, const Tensor& token, int64_t channels, int64_t word) {
  const Beside beside{like};
  check(prompt.numel() == sample_word.numel() && (!step_word || prompt.numel() == step_word->numel()),
        "prompt, sample_word and step_word differ in length: ", prompt.numel(), ", ", sample_word.numel(),
        " and ", step_word ? step_word->numel() : prompt.numel());
  return {static_cast<uint64_t>(seed), prompt.numel(), channels / 4, beside.integers(prompt, "prompt"),
          beside.integers(sample_word, "sample_word"), step_word ? beside.integers(*step_word, "step_word") : nullptr,
          beside.integers(token, "token"), word};
}
