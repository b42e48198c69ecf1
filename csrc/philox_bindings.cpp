// qirl::philox_words and qirl::philox_normal on torch's stable ABI. Every *.cpp here is compiled once for the CPU, with the
// schemas, and where nvcc is once more with QIRL_CUDA, for the CUDA implementations alone.
#include <algorithm>
#include <cstring>

#include "bindings.h"
#include "philox.h"

#ifdef QIRL_CUDA
extern "C" const char* qirl_philox_words(const qirl::WordsCall* call, cudaStream_t stream);
extern "C" const char* qirl_philox_normal(const qirl::NormalCall* call, cudaStream_t stream);
#define RUN(call, like, launch) on_cuda(call, like, launch)
#else
#define RUN(call, like, launch)                                                                            \
  on_cpu(call.calls, 4096, "philox: counter words must fit uint32, and every row must index `prompt`", \
         [&](int64_t i) { return call.run(i); })
#endif

// The error of the last op on this thread, up to `size` bytes with their end; returns its length, 0 where there is none.
extern "C" size_t qirl_take_error(char* text, size_t size) {
  const size_t length = std::min(last_error.size(), size - 1);
  if (length) {
    std::memcpy(text, last_error.data(), length);
    text[length] = '\0';
    last_error.clear();
  }
  return length;
}

static Tensor philox_words(Tensor counter, int64_t seed) {
  const int64_t* words = Beside{counter}.integers(counter, "counter", 2);
  check(size(counter, 1) == 4, "counter must be [N, 4], not [N, ", size(counter, 1), "]");
  if (refused()) return Nothing{counter};
  Tensor out = torch::stable::empty_like(counter);
  const qirl::WordsCall call{size(counter, 0), static_cast<uint64_t>(seed), words,
                             static_cast<int64_t*>(out.data_ptr())};
  RUN(call, counter, qirl_philox_words);
  return out;
}

static Tensor philox_normal(int64_t seed, Tensor prompt, Tensor sample_word, Tensor step_word, Tensor row, Tensor token,
                            int64_t channels) {
  check(channels > 0 && channels % 4 == 0, "channels=", channels, " is not a positive multiple of 4");
  check(row.numel() == token.numel(), "row and token differ in length: ", row.numel(), " and ",
        token.numel());
  const qirl::Noise noise = noise_of(row, seed, prompt, sample_word, step_word, token, channels, 0);
  const int64_t* rows = Beside{row}.integers(row, "row");
  if (refused()) return Nothing{row};
  Tensor out = empty(row, {row.numel(), channels});
  const qirl::NormalCall call{row.numel() * (channels / 4), noise, rows, static_cast<float*>(out.data_ptr())};
  RUN(call, row, qirl_philox_normal);
  return out;
}

#ifdef QIRL_CUDA
STABLE_TORCH_LIBRARY_IMPL(qirl, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(qirl, m) {
  m.def("philox_words(Tensor counter, int seed) -> Tensor");
  m.def("philox_normal(int seed, Tensor prompt, Tensor sample_word, Tensor step_word, Tensor row, Tensor token, "
        "int channels) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qirl, CPU, m) {
#endif
  m.impl("philox_words", TORCH_BOX(&philox_words));
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
}
