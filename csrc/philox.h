// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) and the normals drawn
// from it. One source for g++ and nvcc; the reference in kernels/philox.py is the specification.
#pragma once
#include "scalars.h"

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

// ln of u = k 2^-24, k in 1 .. 2^24: with u = m 2^e, m in [sqrt(1/2), sqrt(2)) and s = (m - 1) / (m + 1),
// ln u = e ln 2 + 2 (s + s^3/3 + s^5/5 + ...). Near 1 the difference m - 1 is exact, so the relative error stays small.
QIRL_FN float log_of(float u) {
  const int32_t bits = bit_cast<int32_t>(u);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float m = bit_cast<float>(bits - exponent * (1 << 23));
  const float s = (m - 1.0f) / (m + 1.0f), q = s * s;
  const float tail = q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9 + q * (1.0f / 11)))));
  return static_cast<float>(exponent) * 0.69314718f + (2.0f * s + 2.0f * s * tail);
}

// sin and cos of a whole turn times `turn` in [0, 1): to the nearest quarter, exactly, then their series on +-pi/4.
QIRL_FN void sine_cosine(float turn, float& sine, float& cosine) {
  const int32_t quarter = static_cast<int32_t>(turn * 4.0f + 0.5f);
  const float x = (turn - static_cast<float>(quarter) * 0.25f) * 6.2831853f, q = x * x;
  const float s = x + x * q * (-1.0f / 6 + q * (1.0f / 120 + q * (-1.0f / 5040 + q * (1.0f / 362880))));
  const float c =
      1.0f + q * (-0.5f + q * (1.0f / 24 + q * (-1.0f / 720 + q * (1.0f / 40320 + q * (-1.0f / 3628800)))));
  const bool swap = quarter & 1;
  sine = (quarter & 2 ? -1.0f : 1.0f) * (swap ? c : s);
  cosine = ((quarter + 1) & 2 ? -1.0f : 1.0f) * (swap ? s : c);
}

// u in (0, 1], angle in [0, 1) turns: z = sqrt(-2 ln u) (cos, sin), within 2e-6 of the exact value.
QIRL_FN void normal_pair(uint32_t w0, uint32_t w1, float* z) {
  const float u = static_cast<float>(static_cast<int32_t>((w0 >> 8) + 1)) * (1.0f / 16777216);
  const float turn = static_cast<float>(static_cast<int32_t>(w1 >> 8)) * (1.0f / 16777216);
  float sine, cosine;
  sine_cosine(turn, sine, cosine);
  const float squared = -2.0f * log_of(u);
  const float radius = sqrtf(squared > 0 ? squared : 0.0f);
  z[0] = radius * cosine;
  z[1] = radius * sine;
}

QIRL_FN bool is_word(int64_t value) { return value >= 0 && value <= 0xFFFFFFFFll; }

// The draws of R samples: counters of a row, and each token's index inside its sample's target.
struct Noise {
  uint64_t seed;
  int64_t rows, quads;                          // rows of the next three; Philox calls in one token
  const int64_t *prompt, *sample_word, *step_word;  // [rows]; without step_word, `word` for all
  const int64_t* token;                         // [tokens]
  int64_t word;

  QIRL_FN int64_t step(int64_t row) const { return step_word ? step_word[row] : word; }

  QIRL_FN bool fits(int64_t row, int64_t i) const {
    return row >= 0 && row < rows && is_word(prompt[row]) && is_word(sample_word[row]) && is_word(step(row)) &&
           token[i] >= 0 && is_word((token[i] + 1) * quads - 1);
  }

  // Four normals: elements 4 quad .. 4 quad + 3 of token i, whose sample is `row`.
  QIRL_FN void quad(int64_t row, int64_t i, int64_t quad, float* z) const {
    const Words words = philox({{static_cast<uint32_t>(token[i] * quads + quad), static_cast<uint32_t>(step(row)),
                                 static_cast<uint32_t>(sample_word[row]), static_cast<uint32_t>(prompt[row])}},
                               seed);
    normal_pair(words.w[0], words.w[1], z);
    normal_pair(words.w[2], words.w[3], z + 2);
  }

  // The normals of V neighbouring channels of token i, from channel c on.
  template <int V>
  QIRL_FN void draw(int64_t row, int64_t i, int64_t c, float (&z)[V]) const {
    if constexpr (V % 4 == 0) {
      for (int j = 0; j < V; j += 4) quad(row, i, (c + j) / 4, z + j);
    } else {
      for (int j = 0; j < V; ++j) {
        float four[4];
        quad(row, i, (c + j) / 4, four);
        const int place = static_cast<int>((c + j) % 4);
        z[j] = place == 0 ? four[0] : place == 1 ? four[1] : place == 2 ? four[2] : four[3];
      }
    }
  }
};

// One unit of work for every i below `calls`; run(i) returns false where an input is out of range.
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
  Noise noise;
  const int64_t* row;  // [tokens]
  float* out;          // [calls, 4]

  QIRL_FN bool run(int64_t i) const {
    const int64_t token = i / noise.quads, own = row[token];
    if (!noise.fits(own, token)) return false;
    noise.quad(own, token, i % noise.quads, out + 4 * i);
    return true;
  }
};

}  // namespace qirl
