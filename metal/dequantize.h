// How dequantize.metal restores tokens.
#pragma once
#include "rotation.h"
#include "trellis.h"

// Copies eight values of a vector, 16 bytes at a time; both pointers are multiples of that.
template <typename T>
METAL_FUNC void copy_eight(const device T* from, device T* out) {
#pragma unroll
  for (int piece = 0; piece < int(sizeof(T)) / 2; piece++) {
    ((device uint4*)out)[piece] = ((const device uint4*)from)[piece];
  }
}

// Writes eight values of a vector; values of 16 bits in one store.
template <typename T>
METAL_FUNC void store_eight(const thread float* x, device T* out) {
  if constexpr (sizeof(T) == 2) {
    uint pairs[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint low = as_type<ushort>(T(x[2 * k]));
      pairs[k] = low | (uint(as_type<ushort>(T(x[2 * k + 1]))) << 16);
    }
    uint4 all;
    all.x = pairs[0];
    all.y = pairs[1];
    all.z = pairs[2];
    all.w = pairs[3];
    ((device uint4*)out)[0] = all;
  } else {
#pragma unroll
    for (int k = 0; k < 8; k++) {
      out[k] = T(x[k]);
    }
  }
}

// Restores one token with one SIMD group, for any rotation. A `packed` token is mean + R^T (scale * levels) of
// vector `from` of its row, whose words are STRIDE apart. Any other token is exact vector `from`.
template <int DIM, int PATTERN, int ORDER, int POWER, int STRIDE, typename Scales, typename Mean,
          typename Constants, typename T>
METAL_FUNC void restore_vector(const device uint* codes, Scales scales, Mean mean, Constants constants,
    const device T* exact, bool packed, int from, device T* out, threadgroup float* values, int lane) {
  if (!packed) {
    for (int i = lane; i < DIM; i += LANES) {
      out[i] = exact[from * DIM + i];
    }
    return;
  }
  constexpr int BITS = bits_of(PATTERN, 0);
  constexpr int SIGNS = level_place(PATTERN, 4);
  const device uint* words = codes + token_start<vector_words<DIM, PATTERN>(), STRIDE>(from);
  const float scale = float(scales[from]);
  for (int i = lane; i < DIM; i += LANES) {
    if constexpr (is_trellis(PATTERN)) {
      values[i] = scale * constants[window_at(words, STRIDE, (i + 1) * BITS)];
    } else {
      values[i] = scale * level_of(BITS, constants, code_at<DIM, BITS>(words, STRIDE, i));
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  butterflies<DIM, POWER>(values, uint(lane));
  const float normalisation = rsqrt(float(POWER));
  for (int i = lane; i < DIM; i += LANES) {
    const float value = matrix_row<ORDER, POWER, true>(constants + SIGNS + DIM, values, i);
    out[i] = T(value * normalisation * constants[SIGNS + i] + mean[i]);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Restores one run of the coordinates of a vector on the axes of a basis. The words of the run are STRIDE apart, and
// `before` is the word before it.
template <int PATTERN, int STRIDE, typename Constants, typename T>
METAL_FUNC void restore_run(const device uint* words, uint before, float scale, Constants constants, device T* out) {
  uint loaded[pattern_words(PATTERN)];
#pragma unroll
  for (int word = 0; word < pattern_words(PATTERN); word++) {
    loaded[word] = words[word * STRIDE];
  }
#pragma unroll
  for (int eight = 0; eight < 4; eight++) {
    const int bits = bits_of(PATTERN, eight);
    const auto levels = constants + level_place(PATTERN, eight);
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      if constexpr (is_trellis(PATTERN)) {
        const int end = code_end(PATTERN, eight * 8 + i);
        x[i] = bits == 0 ? 0.0f : scale * levels[window_of_run(loaded, before, end)];
        x[i + 1] = bits == 0 ? 0.0f : scale * levels[window_of_run(loaded, before, end + bits)];
      } else {
        const uint codes = two_codes_of_run<PATTERN, false>(loaded, eight, i, 0);
        x[i] = bits == 0 ? 0.0f : scale * level_of(bits, levels, codes & 0xFFFFu);
        x[i + 1] = bits == 0 ? 0.0f : scale * level_of(bits, levels, codes >> 16);
      }
    }
    store_eight(x, out + eight * 8);
  }
}

// Restores tokens `first` to `last` - 1 of a row with one SIMD group. `sizes` are those of dequantize.metal;
// `codes` to `out` belong to the row. Vectors on the axes of a basis have no rotation here, and their bits may
// differ. For a Hadamard rotation of a power of two several vectors are restored at once: a lane has at least
// eight coordinates in its registers, with their signs and means. Any other rotation goes through `values` in
// threadgroup memory. 32 bits are enough for indices within a row.
template <int DIM, int PATTERN, int ORDER, int POWER, int STRIDE, typename Scales, typename Mean,
          typename Constants, typename T, typename Sizes>
METAL_FUNC void restore_tokens(const device uint* codes, Scales scales, Mean mean, Constants constants,
    const device T* exact, device T* out, Sizes sizes, int first, int last, threadgroup float* values,
    int lane) {
  const int sinks = sizes[0];
  const int recent = sizes[0] + sizes[1];
  const int shift = sizes[2] - recent;
  if constexpr (ORDER == 1 && POWER == 1) {
    // A lane takes a run: those of a token are neighbours.
    constexpr int RUNS = DIM / 32;
    constexpr int WORDS = vector_words<DIM, PATTERN>();
    for (int item = lane; item < (last - first) * RUNS; item += LANES) {
      const int token = first + item / RUNS;
      const int run = item % RUNS;
      device T* to = out + (token * DIM + run * 32);
      if (token >= sinks && token < recent) {
        const int from = token - sinks;
        const device uint* words =
            codes + (token_start<WORDS, STRIDE>(from) + run * pattern_words(PATTERN) * STRIDE);
        const uint before = is_trellis(PATTERN) && run > 0 ? words[-STRIDE] : 0u;
        restore_run<PATTERN, STRIDE>(words, before, float(scales[from]), constants, to);
      } else {
        const device T* from = exact + ((token < sinks ? token : token + shift) * DIM + run * 32);
#pragma unroll
        for (int i = 0; i < 32; i += 8) {
          copy_eight(from + i, to + i);
        }
      }
    }
  } else if constexpr (ORDER == 1 && POWER >= 64) {
    constexpr int BITS = bits_of(PATTERN, 0);
    constexpr int COUNT = DIM > 256 ? DIM / LANES : 8;
    constexpr int VECTOR_LANES = DIM / COUNT;
    constexpr int SIGNS = level_place(PATTERN, 4);
    constexpr int PLANES = plane_count<BITS>();
    const int begin = uint(lane) % VECTOR_LANES * COUNT;
    float signs[COUNT];
    float means[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      signs[k] = constants[SIGNS + begin + k] * rsqrt(float(DIM));
      means[k] = mean[begin + k];
    }
    for (int start = first; start < last; start += LANES / VECTOR_LANES) {
      const int token = start + int(uint(lane) / VECTOR_LANES);
      const bool packed = token >= sinks && token < recent && token < last;
      float x[COUNT];
      if (simd_any(packed)) {
        const int from = packed ? token - sinks : 0;
        const device uint* words = codes + token_start<vector_words<DIM, PATTERN>(), STRIDE>(from);
#pragma unroll
        for (int eight = 0; eight < COUNT; eight += 8) {
          const int i = begin + eight;
          if constexpr (is_trellis(PATTERN)) {
            const int word = last_word<BITS, 8>(i);
            uint loaded[2];
            align_codes<BITS, 8>(word > 0 ? words[(word - 1) * STRIDE] : 0u, words[word * STRIDE], i, loaded);
#pragma unroll
            for (int k = 0; k < 8; k++) {
              x[eight + k] = constants[window_of(loaded[0], loaded[1], (7 - k) * BITS)];
            }
          } else {
            uint loaded[PLANES];
            load_eight<32, BITS, STRIDE>(loaded, words + i / 32 * BITS * STRIDE, i % 32);
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
              const uint codes_of_pair = code_pair<8, BITS>(loaded, pair, 0);
              x[eight + 2 * pair] = level_of(BITS, constants, codes_of_pair & 0xFFFFu);
              x[eight + 2 * pair + 1] = level_of(BITS, constants, codes_of_pair >> 16);
            }
          }
        }
        lane_butterflies<DIM, COUNT>(x, lane);
        const float scale = float(scales[from]);
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
          x[k] = fma(scale * signs[k], x[k], means[k]);
        }
      }
      if (token < last) {
        device T* to = out + (token * DIM + begin);
        const int from = token < sinks ? token : token + shift;
#pragma unroll
        for (int eight = 0; eight < COUNT; eight += 8) {
          if (packed) {
            store_eight(x + eight, to + eight);
          } else {
            copy_eight(exact + (from * DIM + begin) + eight, to + eight);
          }
        }
      }
    }
  } else {
    for (int token = first; token < last; token++) {
      const bool packed = token >= sinks && token < recent;
      const int from = token < sinks ? token : token + (packed ? -sinks : shift);
      restore_vector<DIM, PATTERN, ORDER, POWER, STRIDE>(codes, scales, mean, constants, exact, packed, from,
          out + token * DIM, values, lane);
    }
  }
}
