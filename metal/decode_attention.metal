// Attention of a few query rows over all tokens of a compressed cache, as partial results over splits of
// the tokens; combine.metal joins them.
//
//   queries        (batch, query heads, rows, DIM); GROUP_ROWS below is the query heads of one key head
//                  times the rows
//   key_codes      uint32 (batch, heads, capacity / 32, WORDS, 32), interleaved
//   key_scales     bfloat16 (batch, heads, capacity), capacity a multiple of 64
//   key_mean       float32 (batch, heads, 1, DIM)
//   value_codes    uint32 (batch, heads, capacity, VALUE_WORDS); with a VALUE_STRIDE of 32 the key codes
//                  themselves (one latent vector per token is both key and value)
//   value_scales   bfloat16 (batch, heads, capacity)
//   exact_keys     (batch, heads, exact capacity, DIM), exact_values likewise with VALUE_DIM
//   constants      float32: the factor of the scores (8 numbers, the first is used), levels of the keys, of
//                  the values, signs and matrix of the rotation of the keys, see rotation.h
//   sizes          int32: those that _SIZES in attention.py names, then one Span for all sequences or one for
//                  each: packed tokens, sinks, and the first recent token in the exact buffers
//   axes           with BASIS, in place of signs and matrix: half (heads, DIM, DIM), by which queries are
//                  multiplied
//   mask           with MASK_ARRAY: bool or float (batch or 1, query heads or 1, rows or 1, tokens)
//   partial        float32 (batch * heads * GROUP_ROWS, splits, VALUE_DIM + 2): output, maximum and sum;
//                  the maximum is the reference of the exponentials, which no score exceeds by much
//
// Tokens are ordered: sinks, packed tokens, recent tokens. Sequences may differ in length. Each has its
// own numbers of packed tokens and sinks, and its own first recent token in the exact buffers. All end at
// the same place. Columns between these parts have no token.
//
// A threadgroup takes one split of one key head, and ROWS of its query rows, so that a code is unpacked
// once for all of them. The first PACKED_SPLITS splits share the packed tokens, in rotated coordinates: the
// queries are rotated here. The other splits share the exact tokens, in the original coordinates; they are
// short and start last. Each of the SIMDS SIMD groups takes every SIMDS-th block of tokens of its split.
// Each phase is a file: queries.h, attend_packed.h or attend_exact.h, softmax.h.
//
// For the scores a lane takes TOKENS whole packed keys: 32 lanes read 32 consecutive words, a query is read
// once for all, and no sum crosses lanes. For the values a lane takes COORDINATES neighbouring coordinates
// of every AT_ONCE-th token, with the weights from threadgroup memory.
//
// The time goes into arithmetic, not memory. So levels are halves. Sums are floats; with HALF_SUMS, for GPUs
// that have operations on pairs of halves, short sums are halves too. That adds 0.1 % of a score's standard
// deviation, far below the noise of the codes. Many SIMD groups with few registers each hide the latency of
// memory. With AHEAD, loading words before they are used hides it.

threadgroup Memory memory;

const int heads = int(exact_keys_shape[1]);
const int rows = int(queries_shape[2]);
const int group_rows = int(queries_shape[1]) / heads * rows;
const int capacity = int(key_scales_shape[2]);
const int split = int(threadgroup_position_in_grid.y);
const int last_block = capacity / BLOCK_TOKENS - 1;

Place place;
place.lane = thread_index_in_simdgroup;
place.simd = int(simdgroup_index_in_threadgroup);
place.head = int(threadgroup_position_in_grid.x);
place.first_row = int(threadgroup_position_in_grid.z) * ROWS;
place.first_block = split * SIMDS + place.simd;
place.first_vector = uint(place.head) * uint(capacity);
const int thread_index = place.simd * LANES + int(place.lane);

// The first words are requested before `sizes` is loaded.
Keys keys;
Values values;
const uint first = place.first_vector + min(place.first_block, last_block) * BLOCK_TOKENS;
begin(keys, key_codes, first, place.lane);
begin(values, value_codes, first, place.lane);
if (AHEAD) {
  load(keys, 0);
  load(values, 0, place.lane);
}

const int splits = sizes[SPLITS];
const int packed_splits = sizes[PACKED_SPLITS];
const int span = SPANS + (sizes_shape[0] > SPANS + 3 ? place.head / heads * 3 : 0);
if (thread_index == 0) {
  const uint row = uint(place.head * group_rows + place.first_row);
  memory.first_output = (row * uint(splits) + uint(split)) * (VALUE_DIM + 2);
  memory.row_count = min(ROWS, group_rows - place.first_row);
  memory.output_stride = uint(splits) * (VALUE_DIM + 2);
}
const int sinks = sizes[span + 1];
const int recent_shift = sizes[RECENT_SHIFT];
if (MASK > 0 && thread_index < ROWS) {
  const int row = min(place.first_row + thread_index, group_rows - 1);
  const int query_head = place.head % heads * (group_rows / rows) + row / rows;
  memory.mask_starts[thread_index] = MASK == 1
      ? long(sizes[EXACT_COUNT] + recent_shift - rows + row % rows)
      : long(place.head / heads) * sizes[MASK_BATCH_STRIDE] + long(query_head) * sizes[MASK_HEAD_STRIDE] +
          long(row % rows) * sizes[MASK_ROW_STRIDE];
}
#if !MASK_ARRAY
const int mask = 0;
#endif
#if !BASIS
const auto axes = queries;
#endif

Running running;
start(running);
if (split < packed_splits) {
  place.block_step = packed_splits * SIMDS;
  place.count = sizes[span];
  store_tables(memory, constants, thread_index);
  prepare_packed_queries(memory, queries, axes + place.head % heads * (DIM * DIM), key_mean, constants, place,
      group_rows);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  attend_packed(running, memory, keys, values, key_scales, value_scales, constants, last_block,
      sizes[SINK_COLUMNS], mask, place);
} else {
  place.first_block -= packed_splits * SIMDS;
  place.block_step = (splits - packed_splits) * SIMDS;
  place.count = sizes[EXACT_COUNT];
  prepare_exact_queries(memory, queries, constants, place, group_rows);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const long exact = long(place.head) * int(exact_keys_shape[2]);
  attend_exact(running, memory, exact_keys + exact * DIM, exact_values + exact * VALUE_DIM, sinks, sizes[span + 2],
      recent_shift, mask, place);
}
join(running, memory, partial, place);
