// The softmax that exact and packed tokens share in decode_attention.metal: a running sum of weighted values,
// masks, and how SIMD groups are joined.
#pragma once
#include "attention_memory.h"

// For each row: the reference of the exponentials, the sum of the weights, and this lane's coordinates of
// the sum of weighted values, in pairs.
struct Running {
  float largest[ROWS];
  float total[ROWS];
  float2 output[ROWS][PAIRS];
};

METAL_FUNC void start(thread Running& running) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    running.largest[r] = -1e30f;
    running.total[r] = 0.0f;
#pragma unroll
    for (int k = 0; k < PAIRS; k++) {
      running.output[r][k].x = 0.0f;
      running.output[r][k].y = 0.0f;
    }
  }
}

// The score of a token for a row: -inf if the row does not see it. `exists` says whether the sequence has
// the token; `column` is its column of the mask.
template <typename Mask>
METAL_FUNC float visible(float score, bool exists, int column, long mask_start, Mask mask) {
  if constexpr (MASK == 1) {
    exists = exists && column <= mask_start;
  }
  if constexpr (MASK > 1) {
    if (exists) {
      const float entry = float(mask[mask_start + column]);
      exists = MASK == 3 || entry != 0.0f;
      score += MASK == 3 ? entry : 0.0f;
    }
  }
  return exists ? score : -INFINITY;
}

// Moves the reference to the largest of the scores, COUNT tokens per lane, but only where a weight would exceed
// e^4. This is rare after the first blocks.
template <int COUNT>
METAL_FUNC void update(thread Running& running, const thread float (&scores)[COUNT][ROWS]) {
  float excess = -INFINITY;
#pragma unroll
  for (int t = 0; t < COUNT; t++) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      excess = max(excess, scores[t][r] - running.largest[r]);
    }
  }
  if (simd_any(excess > 4.0f)) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float score = scores[0][r];
#pragma unroll
      for (int t = 1; t < COUNT; t++) {
        score = max(score, scores[t][r]);
      }
      const float largest = max(running.largest[r], simd_max(score));
      const float correction = exp(running.largest[r] - largest);
      running.largest[r] = largest;
      running.total[r] *= correction;
#pragma unroll
      for (int k = 0; k < PAIRS; k++) {
        running.output[r][k].x *= correction;
        running.output[r][k].y *= correction;
      }
    }
  }
}

// On Apple's GPUs a store adds a byte offset of 32 bits to a buffer's address by itself.
METAL_FUNC void store(device float* partial, uint at, float x) {
  *(device float*)((device char*)partial + at * uint(sizeof(float))) = x;
}

// Joins the lanes that share coordinates, then the SIMD groups, and writes the rows of `partial`: output,
// reference and sum of the weights. Joining two rows at a time needs little memory.
METAL_FUNC void join(thread Running& running, threadgroup Memory& memory, device float* partial,
    thread const Place& place) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float total = simd_sum(running.total[r]);
    if (place.lane == 0) {
      memory.join.largest[place.simd][r] = running.largest[r];
      memory.join.total[place.simd][r] = total;
    }
  }
#pragma unroll
  for (int first = 0; first < ROWS; first += JOINED) {
#pragma unroll
    for (int r = first; r < first + JOINED && r < ROWS; r++) {
#pragma unroll
      for (int k = 0; k < PAIRS; k++) {
        float2 sum = running.output[r][k];
        for (int step = VALUE_LANES; step < LANES; step *= 2) {
          sum.x += simd_shuffle_xor(sum.x, ushort(step));
          sum.y += simd_shuffle_xor(sum.y, ushort(step));
        }
        const uint i = coordinate_of(place.lane, k);
        if (place.lane < VALUE_LANES && i < VALUE_DIM) {
          memory.join.output[place.simd][r - first][i] = sum.x;
          memory.join.output[place.simd][r - first][i + 1] = sum.y;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int r = first + place.simd; r < first + JOINED && r < ROWS; r += SIMDS) {
      if (r < memory.row_count) {
        float largest = memory.join.largest[0][r];
        for (int s = 1; s < SIMDS; s++) {
          largest = max(largest, memory.join.largest[s][r]);
        }
        float weights[SIMDS];
        float total = 0.0f;
#pragma unroll
        for (int s = 0; s < SIMDS; s++) {
          weights[s] = exp(memory.join.largest[s][r] - largest);
          total += weights[s] * memory.join.total[s][r];
        }
        const uint at = memory.first_output + r * memory.output_stride;
        for (uint i = place.lane; i < VALUE_DIM; i += LANES) {
          float sum = 0.0f;
#pragma unroll
          for (int s = 0; s < SIMDS; s++) {
            sum += weights[s] * memory.join.output[s][r - first][i];
          }
          store(partial, at + i, sum);
        }
        if (place.lane == 0) {
          store(partial, at + VALUE_DIM, largest);
          store(partial, at + VALUE_DIM + 1, total);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
