import copy
import json

import mlx.core as mx
import pytest
from conftest import profile_of
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_turboquant import cache_size, save_prompt_cache
from mlx_turboquant.cli.chat import Conversation
from mlx_turboquant.lm.compression import give_profile
from mlx_turboquant.lm.prompt_store import PromptStore, named
from mlx_turboquant.lm.settings import Settings


@pytest.fixture
def conversation(tiny_lm):
    return Conversation(*tiny_lm, Settings(8))


def answer(conversation, text, tokens=8):
    """The text of a reply, and the number of prompt tokens that were processed."""
    responses = list(conversation.reply(text, max_tokens=tokens))
    return "".join(response.text for response in responses), responses[-1].prompt_tokens


def said(conversation) -> str:
    """The text of all messages as plain lines, without the end of the last one."""
    return "\n".join(message["content"] for message in conversation.messages)


def with_template(tokenizer, template: str) -> TokenizerWrapper:
    """The tokenizer with a chat template."""
    tokenizer = copy.deepcopy(tokenizer._tokenizer)
    tokenizer.chat_template = template
    return TokenizerWrapper(tokenizer)


LIMITED = Settings(8, window=64, max_size=300)
# The first keeps messages as they are, the second ends answers with a special token, the third
# drops comments from all but the last message.
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
ENDING = PLAIN.replace("}}\n", "}}{{ '<|endoftext|>' if m.role == 'assistant' else '\\n' }}")
REWRITING = PLAIN.replace("m.content", "m.content.split('#')[0] if not loop.last else m.content")


@pytest.mark.parametrize("template", [None, PLAIN])
def test_a_chat_with_a_limit_reads_every_token_once(tiny_lm, template):
    model, tokenizer = tiny_lm
    if template is not None:
        tokenizer = with_template(tokenizer, template)
    conversation, total = Conversation(model, tokenizer, LIMITED), 0
    for turn in range(30):
        _, processed = answer(conversation, f"x{turn} = {turn}", tokens=16)
        total += processed + 16
        assert {layer.offset for layer in conversation.cache} == {len(conversation.tokens)}
        assert len(conversation.tokens) == total
        assert cache_size(conversation.cache).tokens <= 300
    assert conversation.cache[0].forgotten > 300
    if template is None:
        assert tokenizer.decode(conversation.tokens) == said(conversation)


@pytest.mark.parametrize("template", [None, ENDING])
def test_the_token_that_ends_a_reply_is_read_once_as_well(tiny_lm, template):
    model, tokenizer = tiny_lm
    if template is not None:
        tokenizer = with_template(tokenizer, template)
    end, total = tokenizer.eos_token_id, 0
    conversation = Conversation(model, tokenizer, LIMITED)

    def end_soon(tokens: mx.array, logits: mx.array) -> mx.array:
        is_end = mx.arange(logits.shape[-1]) == end
        return logits + 1e4 * is_end if tokens.size % 16 == 0 else logits

    for turn in range(30):
        replies = list(
            conversation.reply(f"x{turn} = {turn}", max_tokens=20, logits_processors=[end_soon])
        )
        total += replies[-1].prompt_tokens + replies[-1].generation_tokens
        assert replies[-1].finish_reason == "stop" and conversation.tokens[-1] == end
        assert conversation.messages[-1]["content"] == "".join(reply.text for reply in replies)
        assert {layer.offset for layer in conversation.cache} == {len(conversation.tokens)}
        assert len(conversation.tokens) == total
    assert conversation.cache[0].forgotten
    assert conversation.tokens.count(end) == 30


def test_a_chat_with_a_limit_whose_template_rewrites_answers_begins_anew(tiny_lm):
    model, tokenizer = tiny_lm
    tokenizer = with_template(tokenizer, REWRITING)
    conversation = Conversation(model, tokenizer, LIMITED)
    for turn in range(12):
        answer(conversation, f"x{turn} = {turn} # a comment", tokens=30)
        assert {layer.offset for layer in conversation.cache} == {len(conversation.tokens)}
    again = Conversation(model, tokenizer, LIMITED)
    again.messages = copy.deepcopy(conversation.messages)
    assert conversation.cache[0].forgotten
    assert answer(conversation, "import os") == answer(again, "import os")


def test_a_chat_with_a_limit_goes_on_after_a_reply_that_was_stopped(tiny_lm):
    conversation = Conversation(*tiny_lm, LIMITED)
    answer(conversation, "import os\n" * 200)
    replies = conversation.reply("import sys", max_tokens=50)
    next(replies), next(replies)
    replies.close()
    seen = len(conversation.tokens)
    _, processed = answer(conversation, "def f(x):")
    assert processed < 10 and len(conversation.tokens) == seen + processed + 8


def test_a_turn_processes_only_what_the_cache_does_not_hold(conversation):
    first, _ = answer(conversation, "import os\n" * 50)
    _, processed = answer(conversation, "import sys")
    assert processed < 10
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant"] * 2
    assert conversation.messages[1]["content"] == first


def test_the_cache_holds_exactly_the_known_tokens(conversation):
    for line in ("import os", "def f(x):", "class A:"):
        answer(conversation, line)
        assert cache_size(conversation.cache).tokens == len(conversation.tokens)


def test_a_stopped_reply_stays_in_the_conversation(conversation):
    replies = conversation.reply("import os", max_tokens=50)
    text = next(replies).text + next(replies).text
    replies.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": text}
    assert cache_size(conversation.cache).tokens >= len(conversation.tokens)
    answer(conversation, "import sys")
    assert cache_size(conversation.cache).tokens == len(conversation.tokens)


def test_reset_forgets_all_but_the_system_prompt(tiny_lm):
    conversation = Conversation(*tiny_lm, Settings(), system_prompt="Be brief.")
    answer(conversation, "import os")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert cache_size(conversation.cache).tokens == 0


def test_a_question_that_is_taken_back_is_cut_from_the_cache(tiny_lm, conversation):
    answer(conversation, "import os\n" * 100)
    once, first = list(conversation.messages), len(conversation.tokens)
    answer(conversation, "x = 1\n" * 50)
    assert conversation.undo() == "x = 1\n" * 50 and conversation.messages == once
    text, processed = answer(conversation, "import sys")
    assert processed < 20 and len(conversation.tokens) < first + 50
    again = Conversation(*tiny_lm, Settings(8))
    again.messages = once
    assert cache_size(conversation.cache).tokens == len(conversation.tokens)
    assert text == answer(again, "import sys")[0]


def test_another_system_prompt_leaves_what_was_said(tiny_lm):
    conversation = Conversation(*tiny_lm, Settings(), system_prompt="Be brief.")
    answer(conversation, "import os")
    said_before = conversation.messages[1:]
    conversation.set_system_prompt("Write a lot.")
    assert conversation.messages == [{"role": "system", "content": "Write a lot."}, *said_before]
    assert len(said_before) == 2
    _, processed = answer(conversation, "import sys")
    assert processed == len(conversation.tokens) - 8


def test_a_template_without_a_system_prompt_refuses_one_and_nothing_changes(tiny_lm):
    model, tokenizer = tiny_lm
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    conversation = Conversation(model, with_template(tokenizer, refusing), Settings())
    answer(conversation, "import os")
    with pytest.raises(ValueError, match="refuses the messages .*: take one back with /undo"):
        conversation.set_system_prompt("Be brief.")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]


def test_a_template_that_refuses_messages_changes_nothing(tiny_lm):
    model, tokenizer = tiny_lm
    refusing = (
        "{% if 'bad' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    )
    conversation = Conversation(model, with_template(tokenizer, refusing), Settings())
    answer(conversation, "import os")
    said = list(conversation.messages)
    with pytest.raises(ValueError, match=r"refuses the messages \(no\)"):
        answer(conversation, "bad")
    assert conversation.messages == said


def test_a_question_that_is_stopped_before_an_answer_is_no_turn(conversation):
    def stop(*progress: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(conversation.reply("import os", stop))
    assert conversation.messages == []


def test_a_loaded_conversation_goes_on_as_the_saved_one(conversation, tiny_lm, tmp_path):
    answer(conversation, "import os\n" * 100)
    file = conversation.save(tmp_path / "talk")
    other = Conversation(*tiny_lm, Settings(3))
    other.load(file)
    assert other.messages == conversation.messages
    assert answer(other, "import sys") == answer(conversation, "import sys")


def test_a_loaded_conversation_brings_its_settings(conversation, tiny_lm, tmp_path):
    answer(conversation, "import os")
    file = conversation.save(tmp_path / "chat")
    other = Conversation(*tiny_lm, Settings(2, window=32))
    other.load(file)
    assert other.settings == Settings(8)
    other.reset()
    assert other.cache[0].key_bits == 8


def test_a_loaded_conversation_goes_on_with_the_bases_that_it_began_with(tiny_lm, tmp_path):
    model, tokenizer = tiny_lm
    layers = [0.1] * len(model.layers)
    first, second = (profile_of(model, *layers, seed=seed) for seed in (0, 50))
    give_profile(model, first)
    store = PromptStore(tmp_path, delay=0)
    conversation = Conversation(model, tokenizer, Settings(3), store=store)
    answer(conversation, "import os\n" * 100)
    file = conversation.save(tmp_path / "talk")
    give_profile(model, second)
    other = Conversation(model, tokenizer, Settings(3), store=store)
    other.load(file)
    assert answer(other, "import sys") == answer(conversation, "import sys")
    assert [layer.settings.basis for layer in other.cache] == list(first.bases)
    other.reset()
    answer(other, "import os\n" * 100)
    assert [layer.settings.basis for layer in other.cache] == list(second.bases)
    store.close()


def test_a_file_without_a_conversation_changes_nothing(conversation, tmp_path):
    answer(conversation, "import os")
    file = save_prompt_cache(tmp_path / "cache", conversation.cache, conversation.model)
    messages, tokens = list(conversation.messages), list(conversation.tokens)
    with pytest.raises(ValueError, match="holds no conversation"):
        conversation.load(file)
    assert (conversation.messages, conversation.tokens) == (messages, tokens)


def test_a_conversation_begins_with_what_the_store_knows(tiny_lm, tmp_path):
    model, tokenizer = tiny_lm
    long = "import os\n" * 200
    expected, processed = answer(Conversation(model, tokenizer, Settings(8)), long)
    store = PromptStore(tmp_path, delay=0)
    answer(Conversation(model, tokenizer, Settings(8), store=store), long)
    store.close()
    again = Conversation(model, tokenizer, Settings(8), store=PromptStore(tmp_path))
    text, few = answer(again, long)
    assert text == expected and few < processed / 10
    assert cache_size(again.cache).tokens == len(again.tokens)


def test_what_is_kept_of_a_chat_names_its_model_and_is_not_of_other_settings(tiny_lm, tmp_path):
    store, long = PromptStore(tmp_path, delay=0), "import os\n" * 200
    answer(Conversation(*tiny_lm, Settings(8), store=store, model_name="tiny"), long)
    store.close()
    (entry,) = store.entries()
    assert entry.model.startswith("tiny (") and entry.beginning.startswith("import os")
    store = PromptStore(tmp_path, delay=0)
    _, all_of_it = answer(Conversation(*tiny_lm, Settings(2), store=store), long)
    assert all_of_it > 400


def test_a_conversation_that_is_deleted_leaves_no_prompt_of_it(tiny_lm, tmp_path):
    store = PromptStore(tmp_path, delay=0)
    for name, text in (("monday", "import os\n" * 200), ("tuesday", "x = 1\n" * 200)):
        conversation = Conversation(*tiny_lm, Settings(8), store=store, model_name="tiny")
        answer(conversation, text)
        with store.writing():
            conversation.save(store.session_file(name))
    store.close()
    assert len(store.entries()) == 2
    store.delete(named(store.sessions(), "monday"))
    assert [entry.name for entry in store.sessions()] == ["tuesday"]
    (entry,) = store.entries()
    assert entry.beginning.startswith("x = 1")


@pytest.mark.parametrize("settings", [{"bits": 2}, {"bits": 1.7}, {"speed": 1}, [1]])
def test_a_conversation_that_cannot_be_read_changes_nothing(conversation, tmp_path, settings):
    answer(conversation, "import os")
    before = conversation.settings, conversation.tokens, list(conversation.messages)
    chat = {"chat": json.dumps({"settings": settings, "messages": []})}
    file = save_prompt_cache(tmp_path / "chat", conversation.cache, conversation.model, chat)
    with pytest.raises(ValueError, match="holds no conversation: use a file that /save"):
        conversation.load(file)
    assert (conversation.settings, conversation.tokens, conversation.messages) == before
