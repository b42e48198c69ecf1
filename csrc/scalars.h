// What every op needs: functions that g++ and nvcc compile alike, bfloat16, and vectors of V neighbouring elements.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define QIRL_INLINE __attribute__((always_inline))  // of a lambda: g++ vectorises a loop around it only then
#ifdef __CUDACC__
#define QIRL_FN __host__ __device__ __forceinline__
#else
#define QIRL_FN inline QIRL_INLINE
#endif

namespace qirl {

struct BF16 {
  uint16_t bits;
};

template <class To, class From>
QIRL_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

QIRL_FN float widen(float x) { return x; }
QIRL_FN float widen(BF16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
QIRL_FN void narrow(float x, float& to) { to = x; }

// To the nearest, ties to even; NaN stays NaN.
QIRL_FN void narrow(float x, BF16& to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// V neighbours in blocks of 16 bytes where they fill some: `at` is then a multiple of V, and `data` is aligned.
template <class T, int V>
struct Vector {
  static constexpr int per_block = V * sizeof(T) % 16 == 0 ? 16 / sizeof(T) : 1;
  struct alignas(per_block == 1 ? alignof(T) : 16) Block {
    T x[per_block];
  };

  static QIRL_FN void load(const void* data, int64_t at, float (&to)[V]) {
    const Block* from = reinterpret_cast<const Block*>(static_cast<const T*>(data) + at);
    for (int b = 0; b < V / per_block; ++b) {
      const Block block = from[b];
      for (int j = 0; j < per_block; ++j) to[b * per_block + j] = widen(block.x[j]);
    }
  }

  static QIRL_FN void store(const float (&from)[V], void* data, int64_t at) {
    Block* to = reinterpret_cast<Block*>(static_cast<T*>(data) + at);
    for (int b = 0; b < V / per_block; ++b) {
      Block block;
      for (int j = 0; j < per_block; ++j) narrow(from[b * per_block + j], block.x[j]);
      to[b] = block;
    }
  }
};

// The threads that share one token. On a CPU there is one; a GPU's sum goes over a power of two of neighbours in a warp,
// in an order that is fixed.
struct Lanes {
  int lane = 0, count = 1;
#ifdef __CUDA_ARCH__
  static constexpr bool waits = true;  // for what it loads: what takes two loads is better asked for after the others
#else
  static constexpr bool waits = false;
#endif

  QIRL_FN float sum(float x) const {
#ifdef __CUDA_ARCH__
    for (int distance = count / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
#endif
    return x;
  }
};

// In pairs, so that no addition waits for more than log2 V others.
template <int V>
QIRL_FN float sum_of(const float (&x)[V]) {
  float part[V];
  for (int j = 0; j < V; ++j) part[j] = x[j];
  for (int half = V / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) part[j] += part[j + half];
  return part[0];
}

}  // namespace qirl
