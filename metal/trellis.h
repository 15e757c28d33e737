// Trellis codes: where the windows of a code stream lie. The level of a coordinate is the entry of a table at the last
// WINDOW bits of the stream; as many of them as the coordinate has bits are its own. The first bit of a stream is the
// highest of its first word, and zeros stand before it.
#pragma once
#include "levels.h"

// The `width` bits that end `below` bits above the end of `last`, the word behind `before`: a window, or those of two
// neighbouring coordinates.
METAL_FUNC uint window_of(uint before, uint last, int below, int width = WINDOW) {
  return (below + width <= 32 ? last >> below : (last >> below) | (before << (32 - below))) & ((1u << width) - 1u);
}

// Where the code of coordinate i ends in the stream of a vector, in bits.
METAL_FUNC constexpr int code_end(int pattern, int i) {
  const int eight = i / 8 % 4;
  const int before = int(eight > 0) * bits_of(pattern, 0) + int(eight > 1) * bits_of(pattern, 1) +
      int(eight > 2) * bits_of(pattern, 2);
  return i / 32 * 32 * pattern_words(pattern) + 8 * before + (i % 8 + 1) * bits_of(pattern, eight);
}

// The window that ends before bit `end` of a stream, whose words are `stride` apart.
template <typename Words>
METAL_FUNC uint window_at(Words words, int stride, int end) {
  const int word = (end - 1) / 32;
  const uint before = word > 0 ? words[(word - 1) * stride] : 0u;
  return window_of(before, words[word * stride], 32 * (word + 1) - end);
}

// The same in the loaded words of a run, behind the word `before`.
METAL_FUNC uint window_of_run(const thread uint* words, uint before, int end, int width = WINDOW) {
  const int word = (end - 1) / 32;
  return window_of(word > 0 ? words[word - 1] : before, words[word], 32 * (word + 1) - end, width);
}

// The last word with a code of COUNT coordinates of BITS bits from i on.
template <int BITS, int COUNT>
METAL_FUNC int last_word(int i) {
  return ((i + COUNT) * BITS - 1) / 32;
}

// Moves the codes of these coordinates, in their last word and the one before, to the end of two words. The window of
// coordinate i + c is then window_of(out[0], out[1], (COUNT - 1 - c) * BITS).
template <int BITS, int COUNT>
METAL_FUNC void align_codes(uint before, uint last, int i, thread uint* out) {
  const int behind = BITS * COUNT % 32 == 0 ? 0 : -(i + COUNT) * BITS & 31;
  out[0] = before >> behind;
  out[1] = last >> behind | before << 1 << (31 - behind);
}
