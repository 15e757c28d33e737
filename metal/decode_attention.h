// What decode_attention.metal consists of besides its loop: loads and stores of many values.
#pragma once
#include "levels.h"
#include "rotation.h"

// Loads one half (0 or 1) of a chunk of an interleaved vector: of the 2 * BITS words, plane after plane,
// of the coordinates 64 * chunk to 64 * chunk + 63. Behind the last coordinate there are zeros.
template <int DIM, int BITS>
METAL_FUNC void load_half_chunk(thread uint* out, const device uint* words, int chunk, int half_index) {
  constexpr int width = first_plane<BITS>();
  constexpr int count = plane_words<DIM, width>();
  const device uint* first = words + chunk * 2 * width * 32;
  for (int j = half_index * width; j < (half_index + 1) * width; j++) {
    out[j] = DIM % 64 == 0 || chunk * 2 * width + j < count ? first[j * 32] : 0u;
  }
  if constexpr (BITS > width) {
    load_half_chunk<DIM, BITS - width>(out + 2 * width, words + count * 32, chunk, half_index);
  }
}

// load_eight for PIECES runs of coordinates of a token, 8 * LANES apart. Lanes behind the last
// coordinate read the first ones in their place.
template <int DIM, int BITS, int STRIDE, int PIECES, int LANES>
METAL_FUNC void load_pieces(thread uint* out, const device uint* words, int coordinate) {
  for (int piece = 0; piece < PIECES; piece++) {
    const int i = coordinate + piece * LANES * 8;
    load_eight<DIM, BITS, STRIDE>(
        out + piece * plane_count<BITS>(), words, DIM % (8 * LANES) == 0 || i < DIM ? i : 0);
  }
}

// Eight floats as halves, pair after pair.
METAL_FUNC uint4 eight_halves(const thread float* x) {
  uint4 pairs;
  pairs.x = as_type<uint>(half2(half(x[0]), half(x[1])));
  pairs.y = as_type<uint>(half2(half(x[2]), half(x[3])));
  pairs.z = as_type<uint>(half2(half(x[4]), half(x[5])));
  pairs.w = as_type<uint>(half2(half(x[6]), half(x[7])));
  return pairs;
}

// COUNT words of threadgroup memory from word `at` on, four in one access where COUNT allows it.
template <int COUNT>
METAL_FUNC void load_words(const threadgroup uint4* words, int at, thread uint* out) {
  if constexpr (COUNT % 4 == 0) {
    for (int k = 0; k < COUNT / 4; k++) {
      const uint4 four = words[at / 4 + k];
      out[4 * k] = four.x;
      out[4 * k + 1] = four.y;
      out[4 * k + 2] = four.z;
      out[4 * k + 3] = four.w;
    }
  } else {
    for (int k = 0; k < COUNT; k++) {
      out[k] = ((const threadgroup uint*)words)[at + k];
    }
  }
}

// The opposite of load_words.
template <int COUNT>
METAL_FUNC void store_words(threadgroup uint4* words, int at, const thread uint* in) {
  if constexpr (COUNT % 4 == 0) {
    for (int k = 0; k < COUNT / 4; k++) {
      uint4 four;
      four.x = in[4 * k];
      four.y = in[4 * k + 1];
      four.z = in[4 * k + 2];
      four.w = in[4 * k + 3];
      words[at / 4 + k] = four;
    }
  } else {
    for (int k = 0; k < COUNT; k++) {
      ((threadgroup uint*)words)[at + k] = in[k];
    }
  }
}
