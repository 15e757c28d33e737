// Attention over packed tokens: scores, weights and values, block after block.
#pragma once
#include "packed_tokens.h"
#include "softmax.h"

// On Apple's GPUs a load adds a byte offset of 32 bits to a buffer's address by itself.
METAL_FUNC bfloat16_t scale_at(const device bfloat16_t* scales, uint vector) {
  return *(const device bfloat16_t*)((const device char*)scales + vector * uint(sizeof(bfloat16_t)));
}

// Scales of the tokens of this lane in a block. They are loaded before the scores, which hides the wait.
struct Scales {
  bfloat16_t keys[TOKENS];
  bfloat16_t values[TOKENS];
};

METAL_FUNC void load(thread Scales& scales, const device bfloat16_t* keys, const device bfloat16_t* values,
    uint first) {
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    scales.keys[t] = scale_at(keys, first + t * LANES);
    scales.values[t] = scale_at(values, first + t * LANES);
  }
}

// Writes the weights of the tokens of a block as halves to threadgroup memory, where the lanes that take
// the values find them. A weight includes the scale of its value, so that the product fits a half.
template <typename Mask>
METAL_FUNC void weigh_block(thread Running& running, thread float (&scores)[TOKENS][ROWS],
    thread const Scales& scales, threadgroup Memory& memory, int first_token, int sink_columns, Mask mask,
    thread const Place& place) {
  float inverse_scale[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const int token = first_token + t * LANES + int(place.lane);
    const float key_scale = float(scales.keys[t]);
    const float value_log = log(max(float(scales.values[t]), 1e-20f));
    inverse_scale[t] = exp(-value_log);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float score = scores[t][r] * (key_scale * memory.factors[r]) + memory.mean_scores[r] + value_log;
      scores[t][r] =
          visible(score, token < place.count, sink_columns + token, memory.mask_starts[r], mask);
    }
  }
  update(running, scores);
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    half weights[2 * ROW_WORDS];
    weights[2 * ROW_WORDS - 1] = half(0.0f);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float weight = exp(scores[t][r] - running.largest[r]);
      running.total[r] += weight * inverse_scale[t];
      weights[r] = half(weight);
    }
    uint words[ROW_WORDS];
#pragma unroll
    for (int k = 0; k < ROW_WORDS; k++) {
      words[k] = as_type<uint>(half2(weights[2 * k], weights[2 * k + 1]));
    }
    store_words<ROW_WORDS>(
        memory.packed.weights[place.simd], (t * LANES + place.lane) * ROW_WORDS, words);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Attends to the packed tokens of a split. `keys` and `values` are at the first block, with AHEAD behind its
// first words.
template <typename Constants, typename Mask>
METAL_FUNC void attend_packed(thread Running& running, threadgroup Memory& memory, thread Keys& keys,
    thread Values& values, const device bfloat16_t* key_scales, const device bfloat16_t* value_scales,
    Constants constants, int last_block, int sink_columns, Mask mask, thread const Place& place) {
  KeyLevels key_levels;
  half2 value_coefficients[4];
#pragma unroll
  for (int eight = 0; eight < 4; eight++) {
    if (first_alike(KEY_PATTERN, eight) == eight) {
      load_coefficients(digit_of(KEY_PATTERN, eight), constants + KEY_LEVELS + level_place(KEY_PATTERN, eight),
          key_levels.coefficients[eight]);
    }
  }
  if (AHEAD) {
    load_coefficients(VALUE_DIGIT, constants + VALUE_LEVELS, value_coefficients);
  }
  for (int block = place.first_block; block * BLOCK_TOKENS < place.count; block += place.block_step) {
    // Words that are loaded ahead after the last block are not used, but must exist.
    const int blocks = AHEAD ? min(place.block_step, last_block - block) : place.block_step;
    Scales scales;
    load(scales, key_scales, value_scales, place.first_vector + uint(block) * BLOCK_TOKENS + place.lane);
    float scores[TOKENS][ROWS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        scores[t][r] = 0.0f;
      }
    }
    score_block(scores, keys, uint(blocks), key_levels, memory);
    weigh_block(running, scores, scales, memory, block * BLOCK_TOKENS, sink_columns, mask, place);
    if (!AHEAD) {
      // Loaded here they take no registers during the scores, where registers are scarcest.
      load_coefficients(VALUE_DIGIT, constants + VALUE_LEVELS, value_coefficients);
    }
    add_block(running, values, uint(blocks), value_coefficients, memory, place);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  const float unit = level_unit(VALUE_DIGIT, constants + VALUE_LEVELS);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
#pragma unroll
    for (int k = 0; k < PAIRS; k++) {
      running.output[r][k].x *= unit;
      running.output[r][k].y *= unit;
    }
  }
}
