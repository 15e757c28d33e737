"""Tasks of finding: named codes, chains of assignments, and the most frequent words.

The chains are RULER's tracking of variables and the words its aggregation (Hsieh et al., "RULER:
What's the Real Context Size of Your Long-Context Language Models?", arXiv 2404.06654).
"""

import math
import random
import re

from .passages import QUESTIONS, SECOND_WORDS, Passage, Question, random_names


def keys(rng: random.Random, length: int, prose: list[str], is_easy: bool) -> Passage:
    """8 to 64 codes with names that are alike, two asked at once; easy: names unlike, one asked."""
    count = min(max(length // 64, 8), 64)
    names = random_names(count, rng, words=60 if is_easy else math.isqrt(count) + 1)
    codes = {name: f"{rng.randrange(10**6):06d}" for name in names}
    questions = []
    for one in rng.sample(names, QUESTIONS):
        other = rng.choice([name for name in names if name != one])
        verb, asked, answer = "is", f"code for {one}", codes[one]
        if not is_easy:
            verb, asked = "are", f"codes for {one} and for {other}"
            answer += f" and {codes[other]}"
        text, opening = f"What {verb} the secret {asked}?", f"The secret {asked} {verb}"
        questions.append(Question(text, opening, f" {answer}."))
    lines = [f"The secret code for {name} is {code}." for name, code in codes.items()]
    return Passage("Remember the secret codes in this text.", lines, prose, questions)


def variables(rng: random.Random, length: int, prose: list[str], is_easy: bool) -> Passage:
    """Chains of four assignments (easy: two), all mixed, each to be followed to its number."""
    count = 2 if is_easy else 4
    names = [name.replace(" ", "_") for name in random_names((QUESTIONS + 1) * count, rng)]
    chains, questions = [], []
    for i in range(QUESTIONS + 1):
        chain = [*names[i :: QUESTIONS + 1], str(rng.randrange(10**4, 10**5))]
        chains.append([f"{name} = {value}" for name, value in zip(chain, chain[1:])])
        text = f"Follow the variable {chain[0]} to its number, line by line."
        opening = f"{chain[0]} ="
        questions.append(Question(text, opening, "\n".join(chains[i]).removeprefix(opening)))
    example = "\n".join(chains.pop())
    order = rng.sample([chain for chain in chains for _ in chain], count * QUESTIONS)
    introduction = f"Follow the variables in this text to their numbers, as here:\n{example}"
    return Passage(introduction, [chain.pop() for chain in order], prose, questions[:-1])


def counting(rng: random.Random, length: int, prose: list[str], is_easy: bool) -> Passage:
    """Some words occur many times in a text: which of six does (easy: five others occur once)."""
    words = rng.sample(SECOND_WORDS, QUESTIONS + 24)
    frequent, rare = words[:QUESTIONS], words[QUESTIONS:]
    times = max(length // 64, 8)
    listed = frequent * times + rare * (1 if is_easy else times // 4)
    rng.shuffle(listed)
    questions = []
    for word in frequent:
        choice = [word, *rng.sample(rare, 5)]
        rng.shuffle(choice)
        which = f"{', '.join(choice[:-1])} or {choice[-1]}"
        text = f"Which of these words occurs most often in the text: {which}?"
        questions.append(Question(text, "The word that occurs most often is", f" {word}."))
    lines = ["Words: " + " ".join(listed[i : i + 8]) for i in range(0, len(listed), 8)]
    is_counted = re.compile(rf"\b({'|'.join(words)})\b", re.IGNORECASE).search
    others = [line for line in prose if not is_counted(line)]
    return Passage("Count the words in this text.", lines, others, questions)
