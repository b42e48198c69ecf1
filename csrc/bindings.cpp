// qirl::philox_words and qirl::philox_normal on torch's stable ABI. Compiled once for the CPU, with the
// schemas, and where nvcc is once more with QIRL_CUDA, for the CUDA implementations alone.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>

#include "philox.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef QIRL_CUDA
using cudaStream_t = struct CUstream_st*;
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
extern "C" const char* qirl_philox_words(const qirl::WordsCall* call, cudaStream_t stream);
extern "C" const char* qirl_philox_normal(const qirl::NormalCall* call, cudaStream_t stream);

template <class Call>
static void run(const Call& call, const Tensor& like, const char* (*launch)(const Call*, cudaStream_t)) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  const char* error = launch(&call, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == nullptr, "philox on CUDA: ", error ? error : "");
}
#define RUN(call, like, launch) run(call, like, launch)
#else
template <class Call>
static void run(const Call& call) {
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, call.calls, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!call.run(i)) ok = false;
  });
  STD_TORCH_CHECK(ok, "philox: counter words must fit uint32, and every row must index `prompt`");
}
#define RUN(call, like, launch) run(call)
#endif

static const int64_t* integers(const Tensor& t, const Tensor& like, const char* name, int64_t dim) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == dim && t.is_contiguous(), name,
                  " must be contiguous int64 with ", dim, " dimension(s)");
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), name,
                  " is on another device than row");
  return static_cast<const int64_t*>(t.data_ptr());
}

static Tensor philox_words(Tensor counter, int64_t seed) {
  const int64_t* words = integers(counter, counter, "counter", 2);
  STD_TORCH_CHECK(counter.size(1) == 4, "counter must be [N, 4], not [N, ", counter.size(1), "]");
  Tensor out = torch::stable::empty_like(counter);
  const qirl::WordsCall call{counter.size(0), static_cast<uint64_t>(seed), words,
                             static_cast<int64_t*>(out.data_ptr())};
  RUN(call, counter, qirl_philox_words);
  return out;
}

static Tensor philox_normal(int64_t seed, Tensor prompt, Tensor sample_word, Tensor row, Tensor token,
                            int64_t channels, int64_t step_word) {
  STD_TORCH_CHECK(channels > 0 && channels % 4 == 0, "channels=", channels, " is not a positive multiple of 4");
  STD_TORCH_CHECK(qirl::is_word(step_word), "step_word=", step_word, " does not fit uint32");
  STD_TORCH_CHECK(prompt.numel() == sample_word.numel(), "prompt and sample_word differ in length: ",
                  prompt.numel(), " and ", sample_word.numel());
  STD_TORCH_CHECK(row.numel() == token.numel(), "row and token differ in length: ", row.numel(), " and ",
                  token.numel());
  Tensor out = torch::stable::new_empty(row, {row.numel(), channels}, ScalarType::Float);
  const qirl::NormalCall call{row.numel() * (channels / 4), static_cast<uint64_t>(seed),
                              static_cast<uint32_t>(step_word), prompt.numel(), channels / 4,
                              integers(prompt, row, "prompt", 1), integers(sample_word, row, "sample_word", 1),
                              integers(row, row, "row", 1), integers(token, row, "token", 1),
                              static_cast<float*>(out.data_ptr())};
  RUN(call, row, qirl_philox_normal);
  return out;
}

#ifdef QIRL_CUDA
STABLE_TORCH_LIBRARY_IMPL(qirl, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(qirl, m) {
  m.def("philox_words(Tensor counter, int seed) -> Tensor");
  m.def("philox_normal(int seed, Tensor prompt, Tensor sample_word, Tensor row, Tensor token, int channels, "
        "int step_word) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qirl, CPU, m) {
#endif
  m.impl("philox_words", TORCH_BOX(&philox_words));
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
}
