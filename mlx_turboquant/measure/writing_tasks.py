"""Tasks of writing: arithmetic in steps, calls of tools, and functions repeated from far back."""

import itertools
import json
import random
import re
from collections.abc import Iterator
from typing import Any

from .passages import FIRST_WORDS, QUESTIONS, SECOND_WORDS, Passage, Question, random_names


def steps(rng: random.Random, length: int, prose: list[str], is_easy: bool) -> Passage:
    """Problems of four sums and differences (easy: two small ones), to be solved step by step."""
    solved = []
    for name in random_names(QUESTIONS + 3, rng):
        problem, solution = _problem(rng, is_easy)
        text, opening = f"Problem {name}: {problem}", f"Solution of problem {name}:"
        solved.append(Question(text, opening, f" {solution}"))
    lines = [f"{text}\n{opening}{solution}" for text, opening, solution in solved[QUESTIONS:]]
    introduction = "Some lines of this text are problems with solutions, step by step."
    return Passage(introduction, lines, prose, solved[:QUESTIONS])


def _problem(rng: random.Random, is_easy: bool) -> tuple[str, str]:
    """A problem, and its solution in steps, in which no number is negative."""
    value = rng.randrange(6, 10) if is_easy else rng.randrange(40, 60)
    problem, solution = [f"start with {value}"], []
    for _ in range(2 if is_easy else 4):
        number = rng.randrange(1, 4 if is_easy else 10)
        word, sign, change = rng.choice([("add", "+", number), ("take away", "-", -number)])
        problem.append(f"{word} {number}")
        solution.append(f"{value} {sign} {number} = {value + change}")
        value += change
    return ", ".join(problem) + ".", ", ".join(solution) + f". The result is {value}."


_ACCOUNT = {"customer": {"type": "string"}, "account": {"type": "integer"}}
_CURRENCIES = ["USD", "EUR", "GBP"]
_TOOLS = {
    "open_account": {"customer": {"type": "string"}},
    "close_account": _ACCOUNT,
    "send_money": {**_ACCOUNT, "amount": {"type": "integer"}, "currency": {"enum": _CURRENCIES}},
}


def tools(rng: random.Random, length: int, prose: list[str], is_easy: bool) -> Passage:
    """Accounts opened in a long history of calls, and the next call with the number of one.

    Easy calls close an account, others send money as well, and to more accounts.
    """

    def request(account: dict[str, Any]) -> tuple[str, str]:
        owner = f"the account of {account['customer']}"
        if is_easy or rng.random() < 0.5:
            return f"User: Close {owner}.", _called("close_account", account)
        money = {"amount": rng.randrange(10, 1000), "currency": rng.choice(_CURRENCIES)}
        text = f"User: Send {money['amount']} {money['currency']} to {owner}."
        return text, _called("send_money", account | money)

    names = random_names(max(length // (256 if is_easy else 128), QUESTIONS), rng)
    accounts = [{"customer": name, "account": rng.randrange(10**5, 10**6)} for name in names]
    lines = []
    for name, properties in _TOOLS.items():
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        lines.append(json.dumps({"name": name, "parameters": parameters}))
    for account in accounts:
        asked = f"User: Open an account for {account['customer']}."
        call = _called("open_account", {"customer": account["customer"]})
        lines.append(f"{asked}\nCall:{call}\nResult: {json.dumps(account)}")
    for account in rng.sample(accounts, 3):
        lines.append("{}\nCall:{}\nResult: true".format(*request(account)))
    following = map(request, rng.sample(accounts, QUESTIONS))
    questions = [Question(text, "Call:", call) for text, call in following]
    introduction = "Call one of these functions for every request of the user."
    return Passage(introduction, lines, prose, questions)


def _called(name: str, arguments: dict[str, Any]) -> str:
    return " " + json.dumps({"name": name, "arguments": arguments})


def read_call(reply: str) -> Any:
    """What a reply says in JSON; None if it is none."""
    try:
        return json.loads(reply)
    except ValueError:
        return None


def functions(
    rng: random.Random, length: int, prose: list[str], is_easy: bool, is_renamed: bool = False
) -> Passage:
    """Functions of five statements (easy: of two, in prose) to repeat, or to repeat renamed."""
    names = [name.replace(" ", "_") for name in random_names(16 * QUESTIONS, rng)]
    words = itertools.cycle(rng.sample(SECOND_WORDS, 64))
    verbs = itertools.cycle(rng.sample(FIRST_WORDS, 64))
    count = 2 if is_easy else 5
    written = [_function(rng, name, words, verbs, count) for name in names]
    questions = []
    for name, (code, variable, renamed) in zip(names[:QUESTIONS], written):
        first, rest = (renamed if is_renamed else code).split("\n", 1)
        request = f"Write down the function {name}, exactly as it is above"
        if is_renamed:
            request += f", but rename the variable {variable} to result"
        opening = f"Here is the function `{name}`:\n\n```python\n{first}"
        questions.append(Question(request + ".", opening, f"\n{rest}\n```"))
    introduction = "Read the functions in this text."
    if is_renamed:
        code, variable, renamed = written[-1]
        introduction += (
            f" An example of renaming {variable} to result:\n```python\n{code}\n```\n"
            f"becomes\n```python\n{renamed}\n```"
        )
    lines = [code + "\n" for code, *_ in written]
    others = prose if is_easy else lines[QUESTIONS:-1]
    return Passage(introduction, lines[:QUESTIONS], others, questions)


def _function(
    rng: random.Random, name: str, words: Iterator[str], verbs: Iterator[str], count: int
) -> tuple[str, str, str]:
    """A function of ``count`` statements, its first variable, and it with another name for that."""
    argument, *variables = itertools.islice(words, count + 1)
    code, known = f"def {name}({argument}):\n", argument
    for variable in variables:
        code += f"    {variable} = {next(verbs)}({known}, {rng.randrange(2, 100)})\n"
        known = variable
    code += f"    return {known}"
    return code, variables[0], re.sub(rf"\b{variables[0]}\b", "result", code)
