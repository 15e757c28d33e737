// How quantize.metal finds the stream of a trellis code with the least squared error: Viterbi's algorithm. One SIMD group
// takes a vector. The cost of a window is the error of the best stream that ends with it. Lane l has the costs of the
// windows l + 32 * j in registers.
//
// A window of which `bits` are new follows 2^bits windows that differ in their first bits, the start, and end alike. So
// the least of their costs is found once for each end, and the start takes the place of the low bits of that cost.
// Starts of eight coordinates are kept in a word of threadgroup memory for each lane, four bits for each coordinate; by
// them the stream is found from its end.
#pragma once
#include "trellis.h"

// More than the error of any stream.
constant constexpr float UNREACHED = 1e30f;

// Adds the errors of eight coordinates `factor` * y[i], or of `count` at the end of a vector, to the costs.
template <int BITS>
METAL_FUNC void search_eight(thread float* costs, const threadgroup float* y, int count, float factor, float weight,
    const threadgroup float* table, threadgroup uint* starts, int lane) {
  // Ends of a lane. From four bits on lanes share one.
  constexpr int ENDS = BITS < 3 ? 8 >> BITS : 1;
  constexpr uint START = (1u << BITS) - 1u;
  float levels[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    levels[j] = table[lane + 32 * j];
  }
  uint word = 0u;
#pragma unroll 2
  for (int i = 0; i < count; i++) {
    uint least[ENDS];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const uint cost = (as_type<uint>(costs[j]) & ~START) | uint(32 * j >> (WINDOW - BITS));
      least[j % ENDS] = j < ENDS ? cost : min(least[j % ENDS], cost);
    }
    least[0] |= uint(lane) >> (WINDOW - BITS);
#pragma unroll
    for (int step = 16; step >= 1 << (WINDOW - BITS); step /= 2) {
      least[0] = min(least[0], simd_shuffle_xor(least[0], ushort(step)));
    }
    uint start = 0u;
#pragma unroll
    for (int end = 0; end < ENDS; end++) {
      start |= (least[end] & START) << (end * BITS);
    }
    // A start of more than four bits is divided between two of the lanes that have it.
    word |= ((BITS > 4 && lane >= 16 ? start >> 4 : start) & 15u) << (4 * i);
    const float own = factor * y[i];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const uint before = simd_shuffle(least[ENDS > 1 ? j >> BITS : 0], ushort(uint(lane + 32 * j) >> BITS & 31u));
      const float error = own - levels[j];
      costs[j] = fma(weight * error, error, as_type<float>(before));
    }
  }
  starts[lane] = word;
}

// The same for an eight of a run whose first coordinate is `first`. It may have no bits.
template <int DIM, int PATTERN, int EIGHT, bool WEIGHTED, typename Weights>
METAL_FUNC void search_part(thread float* costs, const threadgroup float* y, int first, float factor, Weights weights,
    const threadgroup float* tables, threadgroup uint* starts, int lane) {
  if constexpr (bits_of(PATTERN, EIGHT) > 0) {
    search_eight<bits_of(PATTERN, EIGHT)>(costs, y + first, min(8, DIM - first), factor,
        WEIGHTED ? float(weights[EIGHT]) : 1.0f, tables + level_place(PATTERN, EIGHT), starts + first / 8 * LANES,
        lane);
  }
}

// Searches the best stream of a vector y of DIM coordinates times `factor`. Returns the bits of its cost, of which the
// last eight are its last window. `weights` are those of the eights of a run.
template <int DIM, int PATTERN, bool WEIGHTED, typename Weights>
METAL_FUNC uint search_stream(const threadgroup float* y, float factor, Weights weights,
    const threadgroup float* tables, threadgroup uint* starts, int lane) {
  float costs[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    costs[j] = lane + 32 * j == 0 ? 0.0f : UNREACHED;
  }
  constexpr int STEP = is_uniform(PATTERN) && !WEIGHTED ? 8 : 32;
#pragma unroll 1
  for (int first = 0; first < DIM; first += STEP) {
    search_part<DIM, PATTERN, 0, WEIGHTED>(costs, y, first, factor, weights, tables, starts, lane);
    if constexpr (STEP > 8) {
      search_part<DIM, PATTERN, 1, WEIGHTED>(costs, y, first + 8, factor, weights, tables, starts, lane);
      search_part<DIM, PATTERN, 2, WEIGHTED>(costs, y, first + 16, factor, weights, tables, starts, lane);
      search_part<DIM, PATTERN, 3, WEIGHTED>(costs, y, first + 24, factor, weights, tables, starts, lane);
    }
  }
  uint best = ~0u;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    best = min(best, (as_type<uint>(costs[j]) & ~(WINDOWS - 1u)) | uint(lane + 32 * j));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    best = min(best, simd_shuffle_xor(best, ushort(step)));
  }
  return best;
}

// Writes the windows of the stream that ends with `window`. All lanes follow it, and the first one writes.
template <int DIM, int PATTERN>
METAL_FUNC void trace_stream(uint window, const threadgroup uint* starts, threadgroup uchar* windows, int lane) {
#pragma unroll 1
  for (int first = (DIM - 1) / 8 * 8; first >= 0; first -= 8) {
    const int bits = bits_of(PATTERN, is_uniform(PATTERN) ? 0 : first / 8 % 4);
    if (bits == 0) {
      continue;
    }
    const threadgroup uint* starts_of_eight = starts + first / 8 * LANES;
#pragma unroll
    for (int i = 7; i >= 0; i--) {
      if (DIM % 8 > 0 && first + i >= DIM) {
        continue;
      }
      if (lane == 0) {
        windows[first + i] = uchar(window);
      }
      const uint end = window >> bits;
      uint start = starts_of_eight[end & 31u] >> (4 * i);
      if (bits < 3) {
        start = (start & 15u) >> ((end >> 5) * bits);
      } else if (bits > 4) {
        start = (start & 15u) | (starts_of_eight[end | 16u] >> (4 * i) & 15u) << 4;
      }
      window = (start << (WINDOW - bits) & (WINDOWS - 1u)) | end;
    }
  }
}

// Word w of the stream of these windows: a run has whole words.
template <int DIM, int PATTERN>
METAL_FUNC uint word_of_stream(const threadgroup uchar* windows, int w) {
  const int run = w / pattern_words(PATTERN) * 32;
  uint word = 0u;
#pragma unroll 1
  for (int i = run; i < min(run + 32, DIM); i++) {
    const int bits = bits_of(PATTERN, i / 8 % 4);
    const int behind = 32 * (w + 1) - code_end(PATTERN, i);
    if (behind < 32 && behind > -bits) {
      const uint code = windows[i] & ((1u << bits) - 1u);
      word |= behind < 0 ? code >> -behind : code << behind;
    }
  }
  return word;
}
