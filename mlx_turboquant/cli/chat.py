"""``mlx_turboquant chat``: a conversation with a model, in a compressed cache."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load, stream_generate
from mlx_lm.chat import setup_arg_parser
from mlx_lm.cli_ui import corridor_input, make_console, print_header_panel
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..lm.enable import make_prompt_cache
from ..lm.prompt_cache import load_prompt_cache, save_prompt_cache
from ..lm.prompt_store import Progress, PromptStore, named, reading, seen_tokens
from ..lm.report import cache_report, cache_size
from ..lm.settings import Settings
from .loading import load_ready
from .options import add_store_options, open_store, parse

_HELP = """  /help        this list
  /reset       forget the conversation
  /stats       what the cache holds
  /save FILE   save the conversation and its cache
  /load FILE   go on with a saved conversation
  /sessions    the conversations of the prompt store, for --resume
  Ctrl-C       stop the reply
  Ctrl-D       leave"""


def main(arguments: list[str]) -> None:
    """Parse the options of mlx-lm's chat and of the cache, load the model, and talk."""
    parser = setup_arg_parser()
    parser.prog, parser.description = "mlx_turboquant chat", __doc__
    parser.add_argument("-v", "--verbose", action="store_true", help="Show /stats after a reply")
    parser.add_argument("--resume", metavar="NAME", help="Go on with a conversation of the store")
    add_store_options(parser)
    args, settings = parse(parser, arguments, without_effect=("pipeline",))
    store = open_store(args)
    name = args.resume or time.strftime("%Y-%m-%d-%H%M%S")
    if args.resume is not None:
        if store is None:
            raise ValueError("--resume needs the folder of conversations: add --prompt-store DIR.")
        named(store.sessions(), args.resume)
    mx.random.seed(args.seed)
    trust = {"trust_remote_code": args.trust_remote_code}
    options = {"adapter_path": args.adapter_path, "tokenizer_config": trust, **trust}
    model, tokenizer = load_ready(load, args, settings, args.model, **options)
    model_name = Path(args.model).name
    conversation = Conversation(model, tokenizer, settings, args.system_prompt, store, model_name)
    if args.resume is not None:
        conversation.load(store.session_file(name))
    generation = {"max_tokens": args.max_tokens, "prefill_step_size": args.prefill_step_size}
    generation["sampler"] = make_sampler(
        args.temp,
        args.top_p,
        xtc_threshold=args.xtc_threshold,
        xtc_probability=args.xtc_probability,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    with nullcontext() if store is None else closing(store):
        Chat(conversation, generation, args.verbose).run(args.model)
        if store is not None and conversation.tokens:
            conversation.save(store.session_file(name))
            print(f"To go on: mlx_turboquant chat --resume {name} with the same options")


class Conversation:
    """The messages of a chat, and the cache with the tokens of them that the model has seen."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        settings: Settings,
        system_prompt: str | None = None,
        store: PromptStore | None = None,
        model_name: str = "",
    ):
        self.model = model
        self.model_name = model_name
        self.store = store
        self.tokenizer = tokenizer
        self.settings = settings
        self.system_prompt = system_prompt
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        system = [{"role": "system", "content": self.system_prompt}]
        self.messages: list[dict[str, str]] = system if self.system_prompt else []
        self._clear_cache()

    def reply(
        self, text: str, progress: Progress = lambda *_: None, **generation: Any
    ) -> Iterator[GenerationResponse]:
        """Answer ``text``. What was generated belongs to the conversation wherever this stops."""
        self.messages.append({"role": "user", "content": text})
        prompt = self._prompt()
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
                self.messages.append({"role": "assistant", "content": answer})
                self.tokens = tokens[: seen_tokens(self.cache)]

    def save(self, file: Path) -> Path:
        """Write the cache and the conversation to one file; see ``save_prompt_cache``."""
        saved = {"messages": self.messages, "tokens": self.tokens, "model": self.model_name}
        return save_prompt_cache(file, self.cache, self.model, {"chat": json.dumps(saved)})

    def load(self, file: Path) -> None:
        """Go on with a saved conversation. Nothing changes if the file cannot be used.

        Raises:
            ValueError: a file without a conversation, or as in ``load_prompt_cache``.
        """
        cache, metadata = load_prompt_cache(file, self.model, return_metadata=True)
        if "chat" not in metadata:
            raise ValueError(f"{file} holds no conversation: use a file that /save has written.")
        saved = json.loads(metadata["chat"])
        self.cache, self.messages, self.tokens = cache, saved["messages"], saved["tokens"]

    def _clear_cache(self) -> None:
        self.cache = make_prompt_cache(self.model, self.settings)
        self.tokens: list[int] = []

    def _prompt(self) -> list[int]:
        """The tokens of the whole conversation; plain lines for a model without a template.

        Those that the model has seen are the first, unless the template has rewritten their text.
        """
        is_plain = not self.tokenizer.has_chat_template
        if is_plain:
            text = "".join(f"{message['content']}\n" for message in self.messages)
        else:
            text = self.tokenizer.apply_chat_template(
                self.messages, tokenize=False, add_generation_prompt=True
            )
        seen = self._text(self.tokens)
        if self.tokens and text.startswith(seen):
            rest = self.tokenizer.encode(text[len(seen) :], add_special_tokens=False)
            return self.tokens + rest
        return self.tokenizer.encode(text, add_special_tokens=is_plain)

    def _text(self, tokens: list[int]) -> str:
        """The text of tokens, with the special ones that a template writes."""
        return self.tokenizer.decode(
            tokens,
            skip_special_tokens=not self.tokenizer.has_chat_template,
            clean_up_tokenization_spaces=False,
        )

    def _reuse_cache(self, prompt: list[int]) -> int:
        """Cut the cache back to the tokens that ``prompt`` begins with; returns their number.

        At least one token is left to process. A cache that cannot be cut back is made anew.
        """
        known = len(os.path.commonprefix([prompt[:-1], self.tokens]))
        surplus = seen_tokens(self.cache) - known
        if not known or (surplus and not can_trim_prompt_cache(self.cache)):
            self._clear_cache()
            return 0
        trim_prompt_cache(self.cache, surplus)
        self.tokens = self.tokens[:known]
        return known


class Chat:
    """The terminal side: reads lines, runs commands, streams replies."""

    def __init__(self, conversation: Conversation, generation: dict[str, Any], verbose: bool):
        self.conversation = conversation
        self.verbose = verbose
        self.generation = generation
        self.console = make_console()

    def run(self, model_name: str) -> None:
        """Talk until Ctrl-D."""
        lines = [("model", model_name), ("cache", str(self.conversation.settings))]
        print_header_panel(self.console, "mlx_turboquant chat", lines)
        self._note("/help lists the commands")
        while True:
            try:
                line = corridor_input(self.console).strip()
                if line.startswith("/"):
                    try:
                        self._command(line)
                    except (ValueError, OSError) as error:
                        self._note(str(error))
                elif line:
                    self._reply(line)
            except KeyboardInterrupt:
                self._note("Ctrl-D leaves")
            except EOFError:
                return

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        conversation = self.conversation
        if name in ("/save", "/load") and not argument:
            raise ValueError(f"{name} needs a file name: {name} FILE")
        match name:
            case "/help":
                self.console.print(_HELP)
            case "/reset":
                conversation.reset()
                self._note("the conversation is forgotten")
            case "/stats":
                self._stats()
            case "/save":
                self._note(f"saved to {conversation.save(Path(argument).expanduser())}")
            case "/load":
                conversation.load(Path(argument).expanduser())
                self._stats()
            case "/sessions":
                if conversation.store is None:
                    raise ValueError(
                        "There are no conversations without a store: use --prompt-store DIR"
                    )
                for entry in conversation.store.sessions():
                    self._note(entry.name)
            case _:
                self._note(f"{name} is not a command: /help lists them")

    def _reply(self, line: str) -> None:
        response = None
        with _interrupt_flag() as interrupted:

            def stop_between_chunks(*progress: int) -> None:
                if interrupted:
                    raise KeyboardInterrupt

            reply = self.conversation.reply(line, stop_between_chunks, **self.generation)
            with suppress(KeyboardInterrupt), closing(reply):
                for response in reply:
                    print(response.text, end="", flush=True)
                    if interrupted:
                        break
        print()
        speed = f"{response.generation_tps:.1f} tokens/s · " if response else ""
        self._note(f"{speed}cache {cache_size(self.conversation.cache)}")
        if self.verbose:
            self._stats()

    def _stats(self) -> None:
        report = cache_report(self.conversation.cache, self.conversation.model)
        self._note(f"{len(self.conversation.messages)} messages, cache {report.size}")
        for line in str(report).splitlines():
            self._note(line)

    def _note(self, text: str) -> None:
        self.console.print(f"  {text}", style="ui.muted", markup=False)


@contextmanager
def _interrupt_flag() -> Iterator[list[int]]:
    """A list that is not empty after Ctrl-C.

    An exception in the middle of a step would leave some layers of the cache a token ahead.
    """
    pressed: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)
