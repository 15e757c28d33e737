// Attention over exact tokens, in the original coordinates: sinks and recent tokens, few beside the packed ones.
#pragma once
#include "softmax.h"

// Writes the scores of EXACT_TOKENS keys from `first_token` on to threadgroup memory. Eight lanes share a
// token, so that neighbouring lanes read neighbouring coordinates.
template <typename Key>
METAL_FUNC void score_exact(
    threadgroup Memory& memory, const device Key* keys, int first_token, thread const Place& place) {
  const int part = int(place.lane) % 8;
  for (uint t = place.lane / 8; t < EXACT_TOKENS; t += LANES / 8) {
    const device Key* key = keys + long(min(first_token + int(t), place.count - 1)) * DIM;
    float products[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      products[r] = 0.0f;
    }
#pragma unroll EXACT_UNROLLED
    for (int i = part; i < DIM; i += 8) {
      const float coordinate = float(key[i]);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        products[r] += coordinate * memory.exact.queries[r][i];
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float score = shared_sum<8>(products[r]);
      if (part == 0) {
        memory.exact.scores[place.simd][t][r] = score;
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Replaces these scores by weights. There is no token between the sinks and `first_recent`.
template <typename Mask>
METAL_FUNC void weigh_exact(thread Running& running, threadgroup Memory& memory, int first_token, int sinks,
    int first_recent, int recent_shift, Mask mask, thread const Place& place) {
  const int token = first_token + int(place.lane);
  const bool is_sink = token < sinks;
  const bool exists =
      place.lane < EXACT_TOKENS && token < place.count && (is_sink || token >= first_recent);
  const int at = min(int(place.lane), EXACT_TOKENS - 1);
  float scores[1][ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    scores[0][r] = visible(memory.exact.scores[place.simd][at][r], exists,
        token + (is_sink ? 0 : recent_shift), memory.mask_starts[r], mask);
  }
  update(running, scores);
  simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float weight = exp(scores[0][r] - running.largest[r]);
    running.total[r] += weight;
    if (place.lane < EXACT_TOKENS) {
      memory.exact.scores[place.simd][place.lane][r] = weight;
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Attends to the exact tokens of a split. `keys` and `values` are those of the head.
template <typename Key, typename Value, typename Mask>
METAL_FUNC void attend_exact(thread Running& running, threadgroup Memory& memory, const device Key* keys,
    const device Value* values, int sinks, int first_recent, int recent_shift, Mask mask,
    thread const Place& place) {
  // Seen from the first one, the coordinates of a lane are at constant offsets.
  const uint first_coordinate = coordinate_of(place.lane, 0);
  for (int block = place.first_block; block * EXACT_TOKENS < place.count; block += place.block_step) {
    const int first_token = block * EXACT_TOKENS;
    score_exact(memory, keys, first_token, place);
    weigh_exact(running, memory, first_token, sinks, first_recent, recent_shift, mask, place);
    for (uint t = place.lane / VALUE_LANES; t < EXACT_TOKENS; t += AT_ONCE) {
      const device Value* value =
          values + long(min(first_token + int(t), place.count - 1)) * VALUE_DIM + first_coordinate;
#pragma unroll
      for (int k = 0; k < PAIRS; k++) {
        const uint i = coordinate_of(0, k);
        const bool exists = first_coordinate + i < VALUE_DIM;
        const float even = exists ? float(value[i]) : 0.0f;
        const float odd = exists ? float(value[i + 1]) : 0.0f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          const float weight = memory.exact.scores[place.simd][t][r];
          running.output[r][k].x += weight * even;
          running.output[r][k].y += weight * odd;
        }
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}
