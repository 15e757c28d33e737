import pytest
from hidden_codes import answer, code_line, hide_codes, question
from hypothesis import given
from hypothesis import strategies as st


class Characters:
    """A tokenizer whose tokens are single characters."""

    def encode(self, text, add_special_tokens=False):
        return [ord(character) for character in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))


TOKENIZER = Characters()
TEXT = TOKENIZER.encode("x = 1\nprint(x)\n" * 400)


@given(st.integers(1, 8), st.integers(0, 1000))
def test_the_prompt_has_its_length_and_asks_for_a_code_that_it_hides(needles, seed):
    tokens, code = hide_codes(TOKENIZER, TEXT, 3000, needles=needles, seed=seed)
    assert len(tokens) == 3000
    *lines, last = TOKENIZER.decode(tokens).split("\n")
    hidden = [line for line in lines if line.startswith("# The secret code for ")]
    assert len(hidden) == needles
    name = last.removeprefix("# What is the secret code for ").split("?")[0]
    assert last == question(name)
    assert code_line(name, code) in hidden
    assert answer(code) == f" {code}."


@given(st.integers(0, 1000))
def test_a_seed_gives_the_same_prompt_again(seed):
    first, second = (hide_codes(TOKENIZER, TEXT, 2000, seed=seed) for _ in range(2))
    assert first == second
    assert first != hide_codes(TOKENIZER, TEXT, 2000, seed=seed + 1)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_depth_places_the_code_that_is_asked_for(depth):
    tokens, code = hide_codes(TOKENIZER, TEXT, 3000, depth=depth)
    place = TOKENIZER.decode(tokens).index(f"is {code}.")
    # The other three lines and the question take about 250 characters.
    assert abs(place / 3000 - depth) < 0.1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"needles": 0}, "needles is 0"),
        ({"depth": 1.5}, "depth is 1.5"),
        ({"length": 200}, "hidden lines take"),
        ({"length": 100_000}, "give a longer text"),
    ],
)
def test_impossible_prompts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hide_codes(TOKENIZER, TEXT, options.pop("length", 3000), **options)


def test_a_text_without_line_ends_is_refused():
    with pytest.raises(ValueError, match="line ends"):
        hide_codes(TOKENIZER, [120] * 5000, 3000)
