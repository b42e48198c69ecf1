// What the bindings share: torch's stable ABI, checks of tensors, and how a call runs on the CPU and on CUDA.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <optional>
#include <string>

#include "philox.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What the last op that failed on this thread said; empty once qirl_take_error has handed it on. One for each library.
inline thread_local std::string last_error;

// A boxed op that throws nothing: on torch 2.11 an exception that leaves an op ends the process. What is thrown inside is
// kept for kernels/_native.py, which raises it; the op then returns tensors without elements.
template <void (*boxed)(StableIValue*, uint64_t, uint64_t)>
void guarded(StableIValue* stack, uint64_t arguments, uint64_t outputs) noexcept {
  try {
    boxed(stack, arguments, outputs);
    return;
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "an unknown error in csrc";
  }
  for (uint64_t i = 0; i < outputs; ++i) {
    const int64_t none = 0, one = 1;
    AtenTensorHandle handle = nullptr;
    aoti_torch_empty_strided(1, &none, &one, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle);
    stack[i] = 0;
    std::memcpy(&stack[i], &handle, sizeof(handle));
  }
}
#define GUARDED(function) (&guarded<&TORCH_BOX(function)>)

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
  STD_TORCH_CHECK(error == nullptr, "qirl on CUDA: ", error ? error : "");
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
  STD_TORCH_CHECK(ok, message);
}
#endif

namespace {

// Pointers of tensors that must lie beside `like`, in its device.
struct Beside {
  const Tensor& like;

  template <class T>
  T* of(const Tensor& t, const char* name, ScalarType dtype, int64_t dim) const {
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has another dtype than this op takes");
    STD_TORCH_CHECK(t.dim() == dim && t.is_contiguous(), name, " must be contiguous with ", dim, " dimension(s)");
    STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), name,
                    " is on another device than the first tensor");
    return static_cast<T*>(t.data_ptr());
  }
  const int64_t* integers(const Tensor& t, const char* name, int64_t dim = 1) const {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == dim && t.is_contiguous(), name,
                    " must be contiguous int64 with ", dim, " dimension(s)");
    return of<int64_t>(t, name, ScalarType::Long, dim);
  }
  float* floats(const Tensor& t, const char* name, int64_t dim = 1) const {
    return of<float>(t, name, ScalarType::Float, dim);
  }
};

}  // namespace

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype = ScalarType::Float) {
  return torch::stable::new_empty(like, std::vector<int64_t>(size), dtype);
}

// The draws of rows; counters are int64 [R], token int64 [N].
inline qirl::Noise noise_of(const Tensor& like, int64_t seed, const Tensor& prompt, const Tensor& sample_word,
                            const Tensor& step_word, const Tensor& token, int64_t channels) {
  const Beside beside{like};
  STD_TORCH_CHECK(prompt.numel() == sample_word.numel() && prompt.numel() == step_word.numel(),
                  "prompt, sample_word and step_word differ in length: ", prompt.numel(), ", ", sample_word.numel(),
                  " and ", step_word.numel());
  return {static_cast<uint64_t>(seed), prompt.numel(), channels / 4, beside.integers(prompt, "prompt"),
          beside.integers(sample_word, "sample_word"), beside.integers(step_word, "step_word"),
          beside.integers(token, "token")};
}
