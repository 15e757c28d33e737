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
  constexpr int STEP = is_uniform(PATTERN) ? 8 : 32;
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

// Writes the words of the stream that ends with `window`. All lanes follow it, and the first one writes.
template <int DIM, int PATTERN>
METAL_FUNC void write_stream(uint window, const threadgroup uint* starts, threadgroup uint* stream, int lane) {
  int word = vector_words<DIM, PATTERN>() - 1;
  for (; 32 * word >= code_end(PATTERN, DIM - 1); word--) {
    if (lane == 0) {
      stream[word] = 0u;
    }
  }
  int filled = 32 * (word + 1) - code_end(PATTERN, DIM - 1);
  uint bits_of_word = 0u;
#pragma unroll 1
  for (int i = DIM - 1; i >= 0; i--) {
    const int bits = bits_of(PATTERN, is_uniform(PATTERN) ? 0 : i / 8 % 4);
    if (bits == 0) {
      continue;
    }
    const uint mask = (1u << bits) - 1u;
    bits_of_word |= (window & mask) << filled;
    filled += bits;
    if (filled >= 32) {
      if (lane == 0) {
        stream[word] = bits_of_word;
      }
      word--;
      filled -= 32;
      bits_of_word = (window & mask) >> (bits - filled);
    }
    const uint end = window >> bits;
    const threadgroup uint* starts_of_eight = starts + i / 8 * LANES;
    const uint low = starts_of_eight[end & 31u] >> (4 * (i % 8));
    const uint high = bits > 4 ? (starts_of_eight[end | 16u] >> (4 * (i % 8)) & 15u) << 4 : 0u;
    const uint start = ((low & 15u) >> (bits < 3 ? (end >> 5) * bits : 0) | high) & mask;
    window = start << (WINDOW - bits) | end;
  }
}
