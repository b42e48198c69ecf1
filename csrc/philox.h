// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) and the normals drawn
// from it. One source for g++ and nvcc; the reference in kernels/philox.py is the specification.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define QIRL_FN __host__ __device__ __forceinline__
#else
#define QIRL_FN inline
#endif

namespace qirl {

struct Words {
  uint32_t w[4];
};

// Ten rounds on the counter `c`, keyed by the low and the high word of `seed`.
QIRL_FN Words philox(Words c, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = 0xD2511F53ull * c.w[0], b = 0xCD9E8D57ull * c.w[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.w[1] ^ k0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.w[3] ^ k1, static_cast<uint32_t>(a)}};
  }
  return c;
}

// u in (0, 1], angle in [0, 1) turns: z = sqrt(-2 ln u) (cos, sin), in float64 rounded to float32.
QIRL_FN void normal_pair(uint32_t w0, uint32_t w1, float* z) {
  const double u = ((w0 >> 8) + 1) / 16777216.0, angle = (w1 >> 8) / 16777216.0;
  const double radius = sqrt(-2.0 * log(u));
#ifdef __CUDA_ARCH__
  double sine, cosine;
  sincospi(2.0 * angle, &sine, &cosine);  // unlike sin and cos it needs no local memory
#else
  const double phi = 6.283185307179586 * angle, sine = std::sin(phi), cosine = std::cos(phi);
#endif
  z[0] = static_cast<float>(radius * cosine);
  z[1] = static_cast<float>(radius * sine);
}

QIRL_FN bool is_word(int64_t value) { return value >= 0 && value <= 0xFFFFFFFFll; }

// One call for every four elements; run(i) writes call i, or returns false where an input is out of range.
struct WordsCall {
  int64_t calls;
  uint64_t seed;
  const int64_t* counter;  // [calls, 4]
  int64_t* out;            // [calls, 4]

  QIRL_FN bool run(int64_t i) const {
    Words words;
    for (int j = 0; j < 4; ++j) {
      if (!is_word(counter[4 * i + j])) return false;
      words.w[j] = static_cast<uint32_t>(counter[4 * i + j]);
    }
    words = philox(words, seed);
    for (int j = 0; j < 4; ++j) out[4 * i + j] = words.w[j];
    return true;
  }
};

struct NormalCall {
  int64_t calls;
  uint64_t seed;
  uint32_t step_word;
  int64_t prompts, per_token;           // rows of the next two; calls in one token
  const int64_t *prompt, *sample_word;  // [prompts]
  const int64_t *row, *token;           // [calls / per_token]
  float* out;                           // [calls, 4]

  QIRL_FN bool run(int64_t i) const {
    const int64_t r = row[i / per_token], t = token[i / per_token];
    if (r < 0 || r >= prompts || !is_word(prompt[r]) || !is_word(sample_word[r]) || !is_word(t)) return false;
    const int64_t quad = t * per_token + i % per_token;
    if (!is_word(quad)) return false;
    const Words words = philox({{static_cast<uint32_t>(quad), step_word, static_cast<uint32_t>(sample_word[r]),
                                 static_cast<uint32_t>(prompt[r])}}, seed);
    normal_pair(words.w[0], words.w[1], out + 4 * i);
    normal_pair(words.w[2], words.w[3], out + 4 * i + 2);
    return true;
  }
};

}  // namespace qirl
