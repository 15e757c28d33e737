import json
import random
from dataclasses import replace

import pytest
from conftest import profile_of

from mlx_turboquant.lm.compression import give_profile
from mlx_turboquant.lm.settings import Settings
from mlx_turboquant.measure import finding_tasks
from mlx_turboquant.measure.cache_specs import EXACT, MLX_LM, preset
from mlx_turboquant.measure.passages import (
    QUESTIONS,
    SECOND_WORDS,
    Passage,
    Question,
    prompts_of,
    random_names,
)
from mlx_turboquant.measure.tasks import TASKS, TaskRun, pair

PROSE = [f"line {i} of a text in which nothing of any interest is ever said." for i in range(400)]
ABOUT = {"model": "tiny-lm"}


def made(name: str, is_easy: bool, seed: int = 0, length: int = 2048) -> Passage:
    return TASKS[name].make(random.Random(seed), length, PROSE, is_easy)


def run(tiny_lm, tmp_path, *presets) -> TaskRun:
    specs = [preset(name, Settings(uniform=True)) for name in presets]
    return TaskRun(*tiny_lm, specs, PROSE, tmp_path / "tasks.jsonl", ABOUT)


@pytest.mark.parametrize("is_easy", [True, False])
@pytest.mark.parametrize("name", TASKS)
def test_only_its_own_answer_is_right_for_a_question(name, is_easy):
    task, passage = TASKS[name], made(name, is_easy)
    answers = [question.answer for question in passage.questions]
    assert len(answers) == QUESTIONS
    for i, answer in enumerate(answers):
        rights = [task.is_right(reply, answer) for reply in answers]
        assert rights[i] and not all(rights)
        assert not task.is_right("", answer) and not task.is_right("I do not know 123.", answer)


@pytest.mark.parametrize("length", [512, 2048])
@pytest.mark.parametrize("is_easy", [True, False])
@pytest.mark.parametrize("name", TASKS)
def test_no_question_of_a_passage_is_asked_twice(name, is_easy, length):
    for seed in range(20):
        questions = made(name, is_easy, seed, length).questions
        assert len({question.text for question in questions}) == QUESTIONS


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_is_a_passage(name):
    assert made(name, True) == made(name, True) != made(name, True, seed=1)


@pytest.mark.parametrize("count, words", [(1, 8), (64, 8), (64, 64), (4096, 64)])
def test_names_are_different(count, words):
    names = random_names(count, random.Random(0), words=words)
    assert len(set(names)) == len(names)


def test_keys_are_8_to_64_with_names_that_are_alike():
    assert [len(made("keys", False, length=n).lines) for n in (512, 2048, 8192)] == [8, 32, 64]
    words = {line.split(" is ")[0].split()[-1] for line in made("keys", False).lines}
    assert len(words) <= 6  # for 32 names


def test_a_chain_of_variables_ends_in_its_number():
    passage = made("variables", False)
    known = {}
    for line in passage.lines:  # as a program would
        name, value = line.split(" = ")
        known[name] = known.get(value, value)
    for question in passage.questions:
        assert TASKS["variables"].read(question.answer) == [known[question.opening.split()[0]]]


@pytest.mark.parametrize("is_easy", [True, False])
def test_steps_are_right_arithmetic(is_easy):
    for question in made("steps", is_easy).questions:
        *steps, result = question.answer.removesuffix(".").replace(". ", ", ").split(", ")
        for step in steps:
            terms, value = step.split(" = ")
            assert eval(terms) == int(value) >= 0
        assert result == f"The result is {value}"


def test_a_call_must_be_json_with_the_same_arguments():
    task = TASKS["tools"]
    call = {"name": "close_account", "arguments": {"customer": "amber falcon", "account": 7}}
    answer, arguments = json.dumps(call), call["arguments"]
    assert task.is_right(json.dumps({"arguments": arguments, "name": "close_account"}), answer)
    for wrong in (
        answer[:-1],
        json.dumps(call | {"name": "open"}),
        json.dumps(call | {"arguments": arguments | {"account": "7"}}),
        "[]",
    ):
        assert not task.is_right(wrong, answer)


@pytest.mark.parametrize(
    "name, reply, answer, is_right",
    [
        ("keys", " 123456. The secret code for it is 7.\n", " 123456.", True),
        ("keys", " 123456 and 654321.", " 654321 and 123456.", False),
        ("variables", " bold_lion\nbold_lion = 77\nx = 5", " b_c\nb_c = 77", True),
        ("counting", ' "lion", I think.', " lion", True),
        ("steps", " 8 + 1 = 9. The result is 9.\n5", " 9 + 0 = 9. The result is 9.", True),
        ("steps", " The result is 9, not 8.", " The result is 9.", False),
        ("copy", "\n    return a \n\n```", "\n    return a\n```", True),
        ("copy", "\n  return a\n```", "\n    return a\n```", False),
    ],
)
def test_a_reply_is_read_up_to_its_end(name, reply, answer, is_right):
    assert TASKS[name].is_right(reply, answer) is is_right


def test_code_with_a_renamed_variable_is_other_code():
    copied, renamed = made("copy", True).questions[0], made("renaming", True).questions[0]
    assert "result" in renamed.answer and "result" not in copied.answer
    assert copied.answer.count("\n") == renamed.answer.count("\n")
    compile(copied.opening.split("python\n")[1] + copied.answer.removesuffix("```"), "", "exec")


@pytest.mark.parametrize("length", [512, 1000])
def test_prompts_fill_their_length_and_share_all_but_the_question(tiny_lm, length):
    _, tokenizer = tiny_lm
    passage = made("keys", True, length=length)
    shared, rests = prompts_of(tokenizer, passage, length, random.Random(0))
    for rest, question in zip(rests, passage.questions):
        assert length - 40 < len(shared) + len(rest) <= length
        text = tokenizer.decode(shared + rest)
        assert text.endswith(question.opening) and all(line in text for line in passage.lines)
    assert max(map(len, rests)) < 60


def test_the_lines_that_matter_keep_their_order_in_a_prompt(tiny_lm):
    _, tokenizer = tiny_lm
    passage = made("variables", True)
    shared, _ = prompts_of(tokenizer, passage, 1500, random.Random(0))
    lines = tokenizer.decode(shared).splitlines()
    assert [line for line in lines if line in passage.lines] == passage.lines


def test_a_prompt_without_room_is_refused(tiny_lm):
    passage = made("keys", True)
    with pytest.raises(ValueError, match="its prompts need .* tokens"):
        prompts_of(tiny_lm[1], passage, 100, random.Random(0))


def test_a_question_is_the_message_of_a_user_where_there_is_a_template(tiny_lm):
    _, tokenizer = tiny_lm

    class Chat:
        has_chat_template = True
        encode = tokenizer.encode

        def apply_chat_template(self, messages, tokenize, add_generation_prompt, enable_thinking):
            assert add_generation_prompt and not tokenize and not enable_thinking
            return "".join(f"<{m['role']}>{m['content']}<end>" for m in messages)

    passage = Passage("Read.", ["a = 1"], [], [Question("What is a?", "It is", " 1.")] * 2)
    shared, rests = prompts_of(Chat(), passage, 100, random.Random(0))
    text = tokenizer.decode(shared + rests[0])
    assert text == "<user>Read.\n\na = 1\n\nWhat is a?<end>It is"


def test_four_bits_find_the_codes_and_one_bit_loses_some(tiny_lm, tmp_path):
    counted = []
    tasks = run(tiny_lm, tmp_path, "4")
    tasks.progress = counted.append
    tasks.specs.append(preset("K1V1", Settings(window=0, sink_tokens=0)))
    result = tasks.do(TASKS["keys"], 512, 2)
    four, one = (pair([result], name) for name in ("4 bits", "K1V1"))
    assert sum(four[:4]) == 2 * QUESTIONS and four.both >= 12 and four.low <= 0 <= four.high
    assert one.only_exact > one.only_other and one.difference < 0
    assert sum(counted) == 6  # passages read, by three caches


def test_a_second_start_asks_nothing_again(tiny_lm, tmp_path):
    first = run(tiny_lm, tmp_path, "4").do(TASKS["keys"], 512, 1)
    lines = (tmp_path / "tasks.jsonl").read_text()
    (tmp_path / "tasks.jsonl").write_text(lines + '[["keys", 512, tr')  # it was killed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_turboquant.measure.tasks.read_first_chunk", None)
        again = run(tiny_lm, tmp_path, "4").do(TASKS["keys"], 512, 1)
    assert again == first and (tmp_path / "tasks.jsonl").read_text() == lines
    assert len(run(tiny_lm, tmp_path, "4").do(TASKS["keys"], 512, 2).questions) == 2 * QUESTIONS


def test_replies_with_other_bits_in_a_layer_are_others(tiny_lm, tmp_path):
    first = run(tiny_lm, tmp_path, "4")
    first.do(TASKS["keys"], 512, 1)
    with pytest.MonkeyPatch.context() as patch:
        other = [(3, 5)] * 4  # as by another profile
        patch.setattr("mlx_turboquant.lm.compression.Compression.bits", lambda *_: other)
        run(tiny_lm, tmp_path, "4").do(TASKS["keys"], 512, 1)
    _, *lines = map(json.loads, (tmp_path / "tasks.jsonl").read_text().splitlines())
    bits = [key[-1] for key, _ in lines if key[-2] == "4 bits"]
    assert bits == [str([[(5, 3)] * 4, []]), str([other, []])]


def test_replies_with_other_bases_in_a_layer_are_others(tiny_lm, tmp_path):
    for seed in (0, 4, 0):
        give_profile(tiny_lm[0], profile_of(tiny_lm[0], *[0.1] * 4, seed=seed))
        specs = [preset("4", Settings())]
        TaskRun(*tiny_lm, specs, PROSE, tmp_path / "tasks.jsonl", ABOUT).do(TASKS["keys"], 512, 1)
    _, *lines = map(json.loads, (tmp_path / "tasks.jsonl").read_text().splitlines())
    assert len({key[-1] for key, _ in lines if key[-2] == "4 bits"}) == 2
    assert sum(key[-2] == "4 bits" for key, _ in lines) == 2


def test_the_replies_of_another_run_are_refused(tiny_lm, tmp_path):
    run(tiny_lm, tmp_path)
    with pytest.raises(ValueError, match="has the replies of another run: use another --out"):
        TaskRun(*tiny_lm, [], PROSE, tmp_path / "tasks.jsonl", {"model": "other"})


@pytest.mark.parametrize("is_solved", [True, False])
def test_hard_questions_are_asked_where_those_are_solved(tiny_lm, tmp_path, is_solved):
    def make(rng, length, prose, is_easy):
        passage = finding_tasks.keys(rng, length, prose, is_easy=True)
        if is_easy or is_solved:
            return passage
        return passage._replace(questions=[Question("?", "It", " 000000.")] * QUESTIONS)

    task = TASKS["keys"]._replace(make=make)
    result = run(tiny_lm, tmp_path).do(task, 512, 1)  # tiny-lm finds all codes
    assert result.length == 512 and result.is_easy is not is_solved


def test_a_task_that_the_model_does_not_solve_is_said_to_be_so(tiny_lm, tmp_path):
    with pytest.raises(ValueError, match="the exact cache solves .*% at 512 tokens"):
        run(tiny_lm, tmp_path).do(TASKS["variables"], 512, 1)


def test_a_model_of_a_short_context_is_not_asked(tiny_lm, tmp_path):
    model, tokenizer = tiny_lm

    class Short:
        class args:
            max_position_embeddings = 256

    with pytest.raises(ValueError, match="the model has a context of 256 tokens"):
        run((Short, tokenizer), tmp_path).do(TASKS["keys"], 1024, 1)


def test_a_cache_of_mlx_lm_that_fails_is_left_out(tiny_lm, tmp_path):
    tasks = run(tiny_lm, tmp_path)
    broken = replace(MLX_LM[1], name="broken", mlx_lm_bits=7)
    tasks.specs.append(broken)
    result = tasks.do(TASKS["keys"], 512, 1)
    assert list(result.replies) == [EXACT.name] and "broken" in tasks.failures


@pytest.mark.parametrize(
    "name, reply, answer",
    [
        ("keys", " 1234567.", " 123456."),
        ("keys", " 123456789012.", " 123456 and 789012."),
        ("steps", " The result is -8.", " The result is 8."),
        ("steps", " The result is 7.8.", " The result is 8."),
        ("variables", " -77", " 77"),
    ],
)
def test_a_number_is_read_whole(name, reply, answer):
    assert not TASKS[name].is_right(reply, answer)


def test_a_short_text_is_repeated_until_prompts_are_full(tiny_lm):
    passage = made("keys", True)._replace(others=["a line of a text"])
    shared, rests = prompts_of(tiny_lm[1], passage, 1500, random.Random(0))
    assert 1450 < len(shared) + max(map(len, rests)) <= 1500


def test_lines_that_grow_together_make_no_prompt_too_long(tiny_lm):
    class Growing:
        """A token more for each end of a line between two lines, as some tokenizers have."""

        has_chat_template = False

        def encode(self, text, **_):
            return [1] * (1 + text.count("\n") + text.count("x\nx"))

    passage = Passage("x", ["x"], ["x"] * 40, [Question("x?", "x", "x")] * 2)
    shared, rests = prompts_of(Growing(), passage, 30, random.Random(0))
    assert len(shared) + max(map(len, rests)) <= 30


def test_the_words_to_count_are_not_in_the_text():
    text = [f"the {word} of the others" for word in SECOND_WORDS]
    passage = TASKS["counting"].make(random.Random(0), 2048, text, True)
    counted = " ".join(passage.lines).split()
    assert 0 < len(passage.others) < len(text)
    assert not set(counted) & set(" ".join(passage.others).split())


def test_a_template_that_fails_is_the_reason_of_its_task(tiny_lm):
    class Failing:
        has_chat_template = True
        encode = tiny_lm[1].encode

        def apply_chat_template(self, *_, **__):
            raise RuntimeError("no system role")

    with pytest.raises(ValueError, match=r"the chat template fails \(no system role\)"):
        prompts_of(Failing(), made("keys", True), 1500, random.Random(0))


def test_hard_questions_without_room_leave_the_easy_ones(tiny_lm, tmp_path):
    def make(rng, length, prose, is_easy):
        passage = finding_tasks.keys(rng, length, prose, is_easy=True)
        return passage if is_easy else passage._replace(lines=PROSE)

    result = run(tiny_lm, tmp_path).do(TASKS["keys"]._replace(make=make), 512, 1)
    assert result.length == 512 and result.is_easy


@pytest.mark.parametrize("line", [b"?\n", b"[1]\n", b"\xff\n"])
def test_a_damaged_line_of_replies_is_refused(tiny_lm, tmp_path, line):
    run(tiny_lm, tmp_path)
    with (tmp_path / "tasks.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(ValueError, match="tasks.jsonl is damaged: use another --out"):
        run(tiny_lm, tmp_path)
