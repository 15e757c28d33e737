import pytest

from mlx_turboquant import cache_size, enable, save_prompt_cache
from mlx_turboquant.cli.chat import Conversation, Sessions
from mlx_turboquant.lm.prompt_store import PromptStore
from mlx_turboquant.lm.settings import Settings


@pytest.fixture
def conversation(tiny_lm):
    return Conversation(*tiny_lm, Settings(8))


def answer(conversation, text, tokens=8):
    """The text of a reply, and how many tokens of the prompt had to be processed."""
    responses = list(conversation.reply(text, max_tokens=tokens))
    return "".join(response.text for response in responses), responses[-1].prompt_tokens


def test_a_turn_processes_only_what_the_cache_does_not_hold(conversation):
    first, _ = answer(conversation, "import os\n" * 50)
    _, processed = answer(conversation, "import sys")
    assert processed < 30  # the new line, and the end of the reply where it is tokenized anew
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


def test_a_loaded_conversation_goes_on_as_the_saved_one(conversation, tiny_lm, tmp_path):
    answer(conversation, "import os\n" * 100)
    file = conversation.save(tmp_path / "talk")
    other = Conversation(*tiny_lm, Settings(3))
    other.load(file)
    assert other.messages == conversation.messages
    assert answer(other, "import sys") == answer(conversation, "import sys")


def test_a_file_without_a_conversation_changes_nothing(conversation, tmp_path):
    answer(conversation, "import os")
    file = save_prompt_cache(tmp_path / "cache", conversation.cache, conversation.model)
    messages, tokens = list(conversation.messages), list(conversation.tokens)
    with pytest.raises(ValueError, match="holds no conversation"):
        conversation.load(file)
    assert (conversation.messages, conversation.tokens) == (messages, tokens)


def test_a_conversation_begins_with_what_the_store_knows(tiny_lm, tmp_path):
    model, tokenizer = tiny_lm
    enable(model, 8)
    long = "import os\n" * 200
    expected, processed = answer(Conversation(model, tokenizer, Settings(8)), long)
    store = PromptStore(tmp_path, delay=0)
    answer(Conversation(model, tokenizer, Settings(8), store=store), long)
    store.close()
    again = Conversation(model, tokenizer, Settings(8), store=PromptStore(tmp_path))
    text, few = answer(again, long)
    assert text == expected and few < processed / 10
    assert cache_size(again.cache).tokens == len(again.tokens)


def test_conversations_are_listed_and_an_unknown_one_is_refused(conversation, tmp_path):
    answer(conversation, "import os")
    sessions = Sessions(tmp_path / "sessions", None)
    conversation.save(sessions.file)
    assert Sessions(tmp_path / "sessions", sessions.name).names() == [sessions.name]
    with pytest.raises(ValueError, match=f"no conversation 'other': .*{sessions.name}"):
        Sessions(tmp_path / "sessions", "other")
