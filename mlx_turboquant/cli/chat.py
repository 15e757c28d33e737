"""This command holds a conversation with a model, with a compressed cache."""

import json
import os
import re
import signal
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import InitVar, asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load, stream_generate
from mlx_lm.chat import setup_arg_parser
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..lm.compressible import cut_back
from ..lm.enable import make_prompt_cache
from ..lm.prompt_cache import load_prompt_cache, save_prompt_cache
from ..lm.prompt_store import Progress, PromptStore, named, reading, seen_tokens
from ..lm.report import cache_report, cache_size
from ..lm.settings import Settings
from .loading import load_ready
from .options import add_store_options, given_settings, open_store, parse
from .signals import ENDINGS, signals_held, stored_at_the_end
from .store import age
from .terminal import Terminal

_HELP = """\
/help         this list
/reset        begin a new conversation
/undo         take back the last question and its answer
/system TEXT  set the system prompt, or show it
/stats        what the cache holds
/save FILE    save the conversation and its cache
/load FILE    go on with a saved conversation
/sessions     the conversations of the prompt store, for --resume
/delete NAME  delete one of them
Alt-Enter     a new line, as Esc and then Enter
Ctrl-C        stop the reply
Ctrl-D        leave"""


def main(arguments: list[str]) -> None:
    """Parse the options of mlx-lm's chat and of the cache, load the model, and talk."""
    parser = setup_arg_parser()
    parser.prog, parser.description = "mlx_turboquant chat", __doc__
    parser.add_argument("-v", "--verbose", action="store_true", help="Show /stats after a reply")
    text = "Name of a conversation of the store to continue"
    parser.add_argument("--resume", metavar="NAME", help=text)
    add_store_options(parser)
    args, settings = parse(parser, arguments, without_effect=("pipeline",))
    store = open_store(args)
    if args.resume is not None:
        if store is None:
            raise ValueError("--resume needs the folder of conversations: add --prompt-store DIR.")
        saved = named(store.sessions(), args.resume).settings
        if any(saved.get(name, given) != given for name, given in given_settings(args).items()):
            raise ValueError(
                f"The conversation {args.resume} has settings of its own: "
                "leave out the options of the compressed cache."
            )
        if args.system_prompt:
            raise ValueError("--system-prompt is not for --resume: use /system in the chat.")
    mx.random.seed(args.seed)
    trust = {"trust_remote_code": args.trust_remote_code}
    options = {"adapter_path": args.adapter_path, "tokenizer_config": trust, **trust}
    model, tokenizer = load_ready(load, args, settings, args.model, **options)
    model_name = Path(args.model).name
    conversation = Conversation(model, tokenizer, settings, args.system_prompt, store, model_name)
    if args.resume is not None:
        conversation.load(store.session_file(args.resume))
    generation = {"max_tokens": args.max_tokens, "prefill_step_size": args.prefill_step_size}
    generation["sampler"] = make_sampler(
        args.temp,
        args.top_p,
        xtc_threshold=args.xtc_threshold,
        xtc_probability=args.xtc_probability,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    with stored_at_the_end(store):
        Chat(conversation, generation, args).run()


def _version(file: Path) -> tuple[int, int] | None:
    """What tells a file from those that replace it; None if there is no file."""
    with suppress(FileNotFoundError):
        status = file.stat()
        return status.st_ino, status.st_mtime_ns
    return None


@dataclass
class Conversation:
    """The messages of a chat, and the cache with the tokens that it holds."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    settings: Settings
    system_prompt: InitVar[str | None] = None
    store: PromptStore | None = None
    model_name: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self, system_prompt: str | None):
        self.reset()
        if system_prompt:
            self.set_system_prompt(system_prompt)

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = self.system_messages()
        self._clear_cache()

    def system_messages(self) -> list[dict[str, str]]:
        """The system prompt, if there is one."""
        return [message for message in self.messages[:1] if message["role"] == "system"]

    def set_system_prompt(self, text: str) -> None:
        """Replace the system prompt but no messages; ValueError if the template refuses it."""
        message = {"role": "system", "content": text}
        self._prompt([message, {"role": "user", "content": text}])
        self.messages[: len(self.system_messages())] = [message]

    def undo(self) -> str:
        """Take back the last question and its answer, and return the question."""
        if len(self.messages) < 2:
            raise ValueError("There is no question to take back: ask one first.")
        question, _ = self.messages[-2:]
        del self.messages[-2:]
        return question["content"]

    def reply(
        self, text: str, progress: Progress = lambda *_: None, **generation: Any
    ) -> Iterator[GenerationResponse]:
        """Answer ``text``; an answer that is stopped stays in the conversation as far as it got.

        A question without any answer does not. ValueError if the template refuses the messages.
        """
        question = {"role": "user", "content": text}
        prompt = self._prompt([*self.messages, question])
        known, tokens = self._reuse_cache(prompt), list(prompt)
        place = self.store, self.model, self.tokenizer, tokens, self.cache, known, self.model_name
        with reading(*place, progress) as (self.cache, known, progress):
            generation |= {"prompt_cache": self.cache, "prompt_progress_callback": progress}
            replies = stream_generate(self.model, self.tokenizer, prompt[known:], **generation)
            try:
                for response in replies:
                    tokens.append(response.token)
                    yield response
            finally:
                ends = self.tokenizer.eos_token_ids
                answer = self._text([x for x in tokens[len(prompt) :] if x not in ends])
                if len(tokens) > len(prompt):
                    self.messages += [question, {"role": "assistant", "content": answer}]
                self.tokens = tokens[: seen_tokens(self.cache)]

    def save(self, file: Path) -> Path:
        """Write the cache and the conversation to one file; see ``save_prompt_cache``."""
        saved = {"messages": self.messages, "tokens": self.tokens, "model": self.model_name}
        saved["settings"] = asdict(self.settings)
        return save_prompt_cache(file, self.cache, self.model, {"chat": json.dumps(saved)})

    def load(self, file: Path) -> None:
        """Go on with a saved conversation and its settings; a refused file changes nothing.

        Raises:
            ValueError: a file without a conversation, or as in ``load_prompt_cache``.
        """
        cache, metadata = load_prompt_cache(file, self.model, return_metadata=True)
        try:
            saved = json.loads(metadata["chat"])
            settings = Settings(**saved["settings"])
            messages, tokens = saved["messages"], saved["tokens"]
        except (ValueError, LookupError, TypeError) as error:
            remedy = "use a file that /save has written."
            raise ValueError(f"{file} holds no conversation: {remedy}") from error
        self.settings, self.cache, self.messages, self.tokens = settings, cache, messages, tokens

    def _clear_cache(self) -> None:
        self.cache = make_prompt_cache(self.model, self.settings)
        self.tokens: list[int] = []

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """The tokens of a whole conversation; plain lines for a model without a template.

        Tokens that the model has seen come first, unless the template has rewritten their text.
        """
        is_plain = not self.tokenizer.has_chat_template
        if is_plain:
            text = "".join(f"{message['content']}\n" for message in messages)
        else:
            try:
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # whatever a template raises
                raise ValueError(
                    f"The chat template refuses the messages ({error}): take one back with /undo, "
                    "or say a system prompt in a message."
                ) from error
        seen = self._text(self.tokens)
        if self.tokens and text.startswith(seen):
            return self.tokens + self.tokenizer.encode(text[len(seen) :], add_special_tokens=False)
        return self.tokenizer.encode(text, add_special_tokens=is_plain)

    def _text(self, tokens: list[int]) -> str:
        """The text of tokens, with special ones if there is a template to write them."""
        return self.tokenizer.decode(
            tokens,
            skip_special_tokens=not self.tokenizer.has_chat_template,
            clean_up_tokenization_spaces=False,
        )

    def _reuse_cache(self, prompt: list[int]) -> int:
        """Cut the cache back to its common prefix with ``prompt``; return the prefix length.

        At least one token is left to process. A cache that cannot be cut back is replaced.
        """
        known = len(os.path.commonprefix([prompt[:-1], self.tokens]))
        is_prefix = known == seen_tokens(self.cache)
        if not known or not (is_prefix or cut_back(self.cache, known)):
            self._clear_cache()
            return 0
        self.tokens = self.tokens[:known]
        return known


class Chat:
    """Reads lines, runs commands, streams replies, and keeps every turn if there is a store."""

    def __init__(self, conversation: Conversation, generation: dict[str, Any], args: Namespace):
        self.conversation, self.store = conversation, conversation.store
        self.generation, self.args = generation, args
        self.terminal = Terminal()
        self._keep_as(args.resume)

    def run(self) -> None:
        """Talk until Ctrl-D."""
        kept = "" if self.store else "\nthis chat is not kept: --prompt-store DIR keeps chats"
        about = f"model {self.args.model}\ncache {self.conversation.settings}{kept}"
        self._note(f"{about}\n/help lists the commands")
        if self.args.resume and self.conversation.messages:
            last = " ".join(self.conversation.messages[-1]["content"].split())[-60:]
            self._note(f"{len(self.conversation.messages)} messages, the last ends: {last}")
        while True:
            try:
                line = self.terminal.read()
                if re.match(r"/\w+(\s|$)", line):  # not a path or a comment in code
                    self._command(*line.split(maxsplit=1))
                elif line:
                    self._reply(line)
            except BrokenPipeError:  # nobody reads on
                raise
            except (ValueError, OSError) as error:
                self._note(str(error))
            except KeyboardInterrupt:
                self._note("Ctrl-D leaves")
            except EOFError:
                break
        if self.version:
            self._note(f"To go on: mlx_turboquant chat --resume {self.name}, same model and store")

    def _command(self, name: str, argument: str = "") -> None:
        conversation, show = self.conversation, self.terminal.write
        match name:
            case "/save" | "/load" | "/delete" if not argument:
                raise ValueError(f"{name} needs a name: /help shows which")
            case "/sessions" | "/delete" if self.store is None:
                raise ValueError(f"{name} needs a store: start the chat with --prompt-store DIR")
            case "/help":
                show(_HELP)
            case "/reset":
                conversation.reset()
                self._keep_as()
                self._note("a new conversation begins")
            case "/undo":
                self._note(f"taken back: {conversation.undo()[:60]}")
                self._keep()
            case "/system" if argument:
                conversation.set_system_prompt(argument)
                self._note("the messages stay, and are read again with it")
                self._keep()
            case "/system":
                show("".join(x["content"] for x in conversation.system_messages()) or "none is set")
            case "/stats":
                self._stats()
            case "/save":
                self._note(f"saved to {conversation.save(Path(argument).expanduser())}")
            case "/load":
                conversation.load(Path(argument).expanduser())
                self._keep_as()
                self._keep()
                self._stats()
            case "/sessions":
                for entry in self.store.sessions():
                    begins, tokens = " ".join(entry.beginning.split())[:60], len(entry.tokens)
                    show(f"{entry.name}  {age(entry.used)}, {tokens:,} tokens: {begins}")
            case "/delete":
                if argument == self.name:
                    raise ValueError(f"{argument} is this conversation: leave it with /reset first")
                self.store.delete(named(self.store.sessions(), argument))
                self._note(f"{argument} is deleted")
            case _:
                raise ValueError(f"{name} is not a command: /help lists them")

    def _reply(self, line: str) -> None:
        response = None
        # An exception in the middle of a step would leave some layers of the cache a token ahead.
        with signals_held(signal.SIGINT, *ENDINGS) as interrupts:

            def stop_between_chunks(*progress: int) -> None:
                if interrupts:
                    raise KeyboardInterrupt

            reply = self.conversation.reply(line, stop_between_chunks, **self.generation)
            try:
                with suppress(KeyboardInterrupt), closing(reply):
                    for response in reply:
                        self.terminal.write(response.text, end="")
                        if interrupts:
                            break
                self.terminal.write("")
            finally:
                interrupts[:] = [number for number in interrupts if number != signal.SIGINT]
                self._keep()
        speed = f"{response.generation_tps:.1f} tokens/s · " if response else ""
        self._note(f"{speed}cache {cache_size(self.conversation.cache)}")
        if self.args.verbose:
            self._stats()

    def _keep(self) -> None:
        """Write the conversation to the store; signals wait until that is done.

        A conversation that another chat has continued or deleted is kept under a name of its own.
        """
        if self.store is None or not self.conversation.tokens:
            return
        with signals_held(signal.SIGINT, *ENDINGS), self.store.writing():
            if _version(self.store.session_file(self.name)) != self.version:
                old = self.name
                self._keep_as()
                self._note(f"another chat has changed {old}: this one is kept as {self.name}")
            self.conversation.save(self.store.session_file(self.name))
            self._keep_as(self.name)

    def _keep_as(self, name: str | None = None) -> None:
        """Set the name under which turns are kept from here on; without one, it is a new one."""
        # The time, and random digits because two chats may begin at once.
        self.name = name or f"{time.strftime('%Y-%m-%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        self.version = self.store and _version(self.store.session_file(self.name))

    def _stats(self) -> None:
        report = cache_report(self.conversation.cache, self.conversation.model)
        messages = len(self.conversation.messages)
        self.terminal.write(f"{messages} messages, cache {report.size}\n{report}")

    def _note(self, text: str) -> None:
        self.terminal.write(text, is_note=True)
