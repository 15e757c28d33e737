// Inner products of rotated queries with packed vectors: out = scale * <query, levels>.
//
//   queries  float32 (rows, query_count, DIM), rotated like the vectors
//   codes    uint32 (rows, count, WORDS)
//   scales   float32 (rows, count)
//   levels   float32, see level_of in levels.h
//   sizes    int32 (8): query_count, count
//   out      float32 (rows, query_count, count)
//
// A row is one set of vectors; WORDS is vector_words<DIM, BITS * 0x1111>(). A lane takes one vector, so that no
// sum crosses lanes, and QUERIES queries, so that a code is unpacked once for all of them. The queries
// lie in threadgroup memory, where all lanes read the same coordinate at the same time.

constexpr int words = vector_words<DIM, BITS * 0x1111>();
threadgroup float query[QUERIES * DIM];

const int query_count = sizes[0];
const int count = sizes[1];
const int index = int(thread_index_in_simdgroup) + LANES * int(simdgroup_index_in_threadgroup);
const int vector = int(threadgroup_position_in_grid.x) * LANES * SIMDS + index;
const long row = long(threadgroup_position_in_grid.y);
const int first_query = int(threadgroup_position_in_grid.z) * QUERIES;

for (int i = index; i < QUERIES * DIM; i += LANES * SIMDS) {
  const long at = (row * query_count + first_query) * DIM + i;
  query[i] = first_query + i / DIM < query_count ? queries[at] : 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

if (vector < count) {
  float products[QUERIES];
#pragma unroll
  for (int q = 0; q < QUERIES; q++) {
    products[q] = 0.0f;
  }
  for (int i = 0; i < DIM; i++) {
    float level = level_of(
        BITS, levels, code_at<DIM, BITS>(codes + (row * count + vector) * words, 1, i));
#pragma unroll
    for (int q = 0; q < QUERIES; q++) {
      products[q] += level * query[q * DIM + i];
    }
  }
  const float scale = scales[row * count + vector];
#pragma unroll
  for (int q = 0; q < QUERIES; q++) {
    if (first_query + q < query_count) {
      out[(row * query_count + first_query + q) * count + vector] = products[q] * scale;
    }
  }
}
