// Scores and weighted values of a block of packed tokens. decode_attention.metal spends nearly all of its time
// here.
#pragma once
#include "packed_words.h"
#include "softmax.h"

// Adds products in halves, two coordinates per operation (HALF_SUMS, for GPUs that have such operations), or in
// floats.
METAL_FUNC half2 add_product(half2 a, half2 b, half2 sum) {
  return fma(a, b, sum);
}

METAL_FUNC float add_product(half2 a, half2 b, float sum) {
  return fma(float(a.y), float(b.y), fma(float(a.x), float(b.x), sum));
}

METAL_FUNC void add_weighted(half2 level, half weight, thread half2& sum) {
  sum = fma(level, half2(weight), sum);
}

METAL_FUNC void add_weighted(half2 level, half weight, thread float2& sum) {
  sum.x = fma(float(level.x), float(weight), sum.x);
  sum.y = fma(float(level.y), float(weight), sum.y);
}

template <typename Sum, int COUNT, int OTHERS>
METAL_FUNC void clear(thread Sum (&sums)[COUNT][OTHERS]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
#pragma unroll
    for (int j = 0; j < OTHERS; j++) {
      sums[i][j] = Sum(half(0.0f));
    }
  }
}

// The coefficients of level_pair for each eight of a run; eights of the same bits share those of the first one.
struct KeyLevels {
  half2 coefficients[4][4];
};

// Adds the products of an eight of a run of keys with queries. As a template it keeps one of its branches; as the body
// of a loop it had both, and was too long for a compiler to unroll.
template <int EIGHT, typename Sum>
METAL_FUNC void add_eight(thread Sum (&sums)[TOKENS][ROWS], const thread uint (&words)[TOKENS][KEY_BITS],
    const thread uint (&before)[TOKENS], thread const KeyLevels& key_levels, const threadgroup Memory& memory, int run) {
  constexpr int bits = digit_of(KEY_PATTERN, EIGHT);
  if constexpr (bits > 0) {
    const threadgroup uint* table = memory.packed.tables + table_place(KEY_PATTERN, EIGHT);
    half2 levels[TOKENS][4];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if constexpr (is_trellis(KEY_PATTERN)) {
          levels[t][k] =
              pair_of_run<bits>(table, words[t], before[t], code_end(KEY_PATTERN, EIGHT * 8 + 2 * k + 1));
        } else if constexpr (!is_paired(bits)) {
          const int place = code_place(bits, k, !HALF_SUMS);
          levels[t][k] = level_pair(bits, key_levels.coefficients[first_alike(KEY_PATTERN, EIGHT)],
              (const threadgroup half*)table,
              two_codes_of_run<KEY_PATTERN, false>(words[t], EIGHT, 2 * k, place), place);
        } else if (k % 2 == 0) {
          two_pairs(table, two_codes_of_run<KEY_PATTERN, true>(words[t], EIGHT, 2 * k, 0),
              two_codes_of_run<KEY_PATTERN, true>(words[t], EIGHT, 2 * k + 1, 0), levels[t] + k);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const uint4 query = memory.packed.queries[run * (RUN / 8) + EIGHT][r];
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        sums[t][r] = add_product(levels[t][0], as_type<half2>(query.x), sums[t][r]);
        sums[t][r] = add_product(levels[t][1], as_type<half2>(query.y), sums[t][r]);
        sums[t][r] = add_product(levels[t][2], as_type<half2>(query.z), sums[t][r]);
        sums[t][r] = add_product(levels[t][3], as_type<half2>(query.w), sums[t][r]);
      }
    }
  }
}

// Adds the products of a run of keys with queries.
template <typename Sum>
METAL_FUNC void add_scores(thread Sum (&sums)[TOKENS][ROWS], thread const Keys& keys,
    thread const KeyLevels& key_levels, const threadgroup Memory& memory, int run) {
  add_eight<0>(sums, keys.words, keys.before, key_levels, memory, run);
  add_eight<1>(sums, keys.words, keys.before, key_levels, memory, run);
  add_eight<2>(sums, keys.words, keys.before, key_levels, memory, run);
  add_eight<3>(sums, keys.words, keys.before, key_levels, memory, run);
}

// Adds the values of BATCH steps from step `step` of the block on, times the weights of their tokens.
template <typename Pair>
METAL_FUNC void add_values(thread Pair (&sums)[ROWS][PAIRS], const thread uint (&words)[BATCH][PIECES][PLANES],
    const thread half2* coefficients, const threadgroup Memory& memory, int step, thread const Place& place) {
#pragma unroll
  for (int b = 0; b < BATCH; b++) {
    const uint token = (step + b) * AT_ONCE + place.lane / VALUE_LANES;
    uint weights[ROW_WORDS];
    load_words<ROW_WORDS>(memory.packed.weights[place.simd], token * ROW_WORDS, weights);
    half2 levels[2];
#pragma unroll
    for (int k = 0; k < PAIRS; k++) {
      const int piece = 2 * k / COORDINATES;
      const int pair = k % (COORDINATES / 2);
      if constexpr (is_trellis(VALUE_PATTERN)) {
        // The first of the two words is the one before a run here.
        levels[pair % 2] = pair_of_run<VALUE_DIGIT>(memory.packed.tables + VALUE_PLACE, words[b][piece] + 1,
            words[b][piece][0], 32 - (COORDINATES - 2 - 2 * pair) * VALUE_BITS);
      } else if constexpr (!is_paired(VALUE_BITS)) {
        const int place = code_place(VALUE_BITS, pair, !HALF_SUMS);
        levels[pair % 2] = level_pair(VALUE_BITS, coefficients, (const threadgroup half*)(memory.packed.tables + VALUE_PLACE),
            code_pair<8, VALUE_BITS>(words[b][piece], pair, place), place);
      } else if (pair % 2 == 0) {
        two_pairs(memory.packed.tables + VALUE_PLACE, entry_of<VALUE_BITS>(words[b][piece], 2 * pair),
            entry_of<VALUE_BITS>(words[b][piece], 2 * pair + 1), levels);
      }
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const half2 two = as_type<half2>(weights[r / 2]);
        add_weighted(levels[pair % 2], r % 2 == 0 ? two.x : two.y, sums[r][k]);
      }
    }
  }
}

// Adds the scores of a block of keys, without their scales; the next block is `blocks` further. With AHEAD the
// words of a run are loaded while those of the run before are used, and at the end those of the next block.
METAL_FUNC void score_block(thread float (&scores)[TOKENS][ROWS], thread Keys& keys, uint blocks,
    thread const KeyLevels& key_levels, const threadgroup Memory& memory) {
#pragma unroll 1
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    half2 sums[TOKENS][ROWS];
    clear(sums);
#pragma unroll
    for (int k = 0; k < RUNS; k++) {
      const int run = chunk * RUNS + k;
      Keys now = keys;
      const bool is_last = AHEAD && k + 1 == RUNS && chunk + 1 == CHUNKS;
      if (is_last) {
        turn(keys, blocks);
      }
      load(keys, is_last ? 0 : run + AHEAD);
      if constexpr (HALF_SUMS) {
        add_scores(sums, AHEAD ? now : keys, key_levels, memory, run);
      } else {
        add_scores(scores, AHEAD ? now : keys, key_levels, memory, run);
      }
    }
#pragma unroll
    for (int t = 0; HALF_SUMS && t < TOKENS; t++) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        scores[t][r] += float(sums[t][r].x + sums[t][r].y);
      }
    }
  }
  if (!AHEAD) {
    turn(keys, blocks);
  }
}

// Adds the values of a block; the next block is `blocks` further. With AHEAD its first words are loaded before,
// and at the end those of the next block.
METAL_FUNC void add_block(thread Running& running, thread Values& values, uint blocks,
    const thread half2* coefficients, const threadgroup Memory& memory, thread const Place& place) {
  // A sum of halves has at most 32 terms.
  constexpr int TERMS = HALF_SUMS && STEPS > 32 ? 32 : STEPS;
  for (int start = 0; start < STEPS; start += TERMS) {
    half2 sums[ROWS][PAIRS];
    clear(sums);
#pragma unroll UNROLLED
    for (int step = start; step < start + TERMS; step += BATCH) {
      Values now = values;
      const bool is_last = AHEAD && step + BATCH == STEPS;
      if (is_last) {
        turn(values, blocks);
      }
      load(values, is_last ? 0 : step + AHEAD * BATCH, place.lane);
      if constexpr (HALF_SUMS) {
        add_values(sums, AHEAD ? now.words : values.words, coefficients, memory, step, place);
      } else {
        add_values(running.output, AHEAD ? now.words : values.words, coefficients, memory, step, place);
      }
    }
#pragma unroll
    for (int r = 0; HALF_SUMS && r < ROWS; r++) {
#pragma unroll
      for (int k = 0; k < PAIRS; k++) {
        running.output[r][k].x += float(sums[r][k].x);
        running.output[r][k].y += float(sums[r][k].y);
      }
    }
  }
  if (!AHEAD) {
    turn(values, blocks);
  }
}
