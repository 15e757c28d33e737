// Quantizes dense keys and values: subtracts the mean, rotates, finds the gain with the largest cosine,
// encodes, packs, and chooses the scale that makes inner products unbiased.
//
//   keys            T (rows, count, DIM), values likewise with VALUE_DIM
//   key_mean        float32 (rows, DIM)
//   key_cells       float32: the positive levels, ascending, and before each one the limit above it; for all
//                   bits of the pattern, see cell_place in quantize.h; with a trellis code its tables, as in levels.h
//   key_gains       float32 (KEY_GAINS), ascending
//   key_signs       float32 (DIM), of the randomized Hadamard matrix; ones for a dense rotation
//   key_matrix      float32 (ORDER, ORDER), see matrix_row in rotation.h
//   key_weights     float32 (heads, 4) if KEY_WEIGHTED: how much squared errors of the eights of a run count
//   value_mean to value_weights likewise
//   sizes           int32 (8): rows, count, heads
//   key_codes       uint32 (rows, count, WORDS), value_codes likewise
//   key_scales      bfloat16 (rows, count), value_scales likewise
//
// A row is one head of one sequence; WORDS is vector_words<DIM, KEY_PATTERN>().
//
// Threadgroups with y = 0 take keys, those with y = 1 values. VECTOR_LANES lanes quantize one vector. Every
// step but the packing is a sum over its coordinates, which takes fewer steps with fewer lanes; a lane has
// registers for sixteen coordinates. A coordinate stays with its lane through all gains. The codes go to
// threadgroup memory, where a lane collects the fields of a whole word.

constexpr int VECTORS = GROUPS * LANES / VECTOR_LANES;
constexpr int VALUE_VECTORS = GROUPS * LANES / VALUE_VECTOR_LANES;
constexpr int words = vector_words<DIM, KEY_PATTERN>();
constexpr int value_words = vector_words<VALUE_DIM, VALUE_PATTERN>();
constexpr int FLOATS = VECTORS * DIM;
constexpr int VALUE_FLOATS = VALUE_VECTORS * VALUE_DIM;
constexpr int KEY_CELLS = cell_count(KEY_PATTERN);
constexpr int VALUE_CELLS = cell_count(VALUE_PATTERN);
constexpr int KEY_SEARCH = search_words<DIM, KEY_PATTERN>();
constexpr int VALUE_SEARCH = search_words<VALUE_DIM, VALUE_PATTERN>();
constexpr int SEARCHES =
    VECTORS * KEY_SEARCH > VALUE_VECTORS * VALUE_SEARCH ? VECTORS * KEY_SEARCH : VALUE_VECTORS * VALUE_SEARCH;
threadgroup float floats[FLOATS > VALUE_FLOATS ? FLOATS : VALUE_FLOATS];
threadgroup float2 cells[KEY_CELLS > VALUE_CELLS ? KEY_CELLS : VALUE_CELLS];
threadgroup uint starts[SEARCHES > 0 ? SEARCHES : 1];

const int count = sizes[1];
// A division of 64 bits would cost hundreds of instructions and their registers. 32 bits are enough: the
// grid counts threads in 32 bits, and a vector has eight or more.
const uint vectors = uint(sizes[0]) * uint(count);
const uint thread_index = simdgroup_index_in_threadgroup * LANES + thread_index_in_simdgroup;
if (threadgroup_position_in_grid.y == 0) {
  const uint group = thread_index / VECTOR_LANES;
  const uint vector = threadgroup_position_in_grid.x * VECTORS + group;
  const bool inside = vector < vectors;
  const long at = inside ? vector : 0u;
  const long row = uint(at) / uint(count);
  quantize_vector<DIM, KEY_PATTERN, ORDER, POWER, KEY_GAINS, VECTOR_LANES, KEY_WEIGHTED>(
      keys + at * DIM, key_mean + row * DIM, key_cells, key_gains, key_signs, key_matrix,
      key_weights + uint(row) % uint(sizes[2]) * 4, key_codes + at * words, key_scales + at,
      floats + group * DIM, cells, starts + group * KEY_SEARCH, inside, int(thread_index % VECTOR_LANES),
      int(thread_index), GROUPS * LANES);
} else {
  const uint group = thread_index / VALUE_VECTOR_LANES;
  const uint vector = threadgroup_position_in_grid.x * VALUE_VECTORS + group;
  const bool inside = vector < vectors;
  const long at = inside ? vector : 0u;
  const long row = uint(at) / uint(count);
  quantize_vector<VALUE_DIM, VALUE_PATTERN, VALUE_ORDER, VALUE_POWER, VALUE_GAINS, VALUE_VECTOR_LANES,
      VALUE_WEIGHTED>(
      values + at * VALUE_DIM, value_mean + row * VALUE_DIM, value_cells, value_gains, value_signs,
      value_matrix, value_weights, value_codes + at * value_words, value_scales + at,
      floats + group * VALUE_DIM, cells, starts + group * VALUE_SEARCH, inside, int(thread_index % VALUE_VECTOR_LANES),
      int(thread_index), GROUPS * LANES);
}
