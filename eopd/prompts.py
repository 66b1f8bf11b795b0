"""Data sets to ``PromptSample``: JSONL, Parquet or a ``datasets`` name in; seeded, epoch-exact, random-access prompts
out.

A row has ``prompt`` (text) or ``messages`` (chat), and optionally ``id``, ``answer`` and ``source``. Nothing is
consumed: sample number i of a run is a pure function of the seed and i, so that resuming needs no state beyond a
number.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eopd.config import ConfigError, PromptsConfig
from eopd.types import PromptSample, Sampling

Row = Mapping[str, object]


class Tokenizer(Protocol):
    """What rendering needs of a Hugging Face tokenizer."""

    chat_template: str | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...  # noqa: D102
    def apply_chat_template(  # noqa: D102
        self,
        conversation: Sequence[Mapping[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        **options: object,
    ) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherView:
    """How a teacher reads a row of the data when it has a prompt of its own.

    Args:
        name: of the teacher.
        template: Jinja for the text of the last message: the columns of the row, and ``prompt``, the student's text.
        tokenizer: the teacher's; its chat template renders the messages.
        options: of that chat template.
        max_tokens: the longest such prompt.
    """

    name: str
    template: str
    tokenizer: Tokenizer
    options: Mapping[str, object]
    max_tokens: int

    def token_ids(
        self, row: Row, messages: Sequence[Mapping[str, str]], where: str, config: PromptsConfig
    ) -> list[int]:
        """The teacher's prompt.

        Raises:
            ConfigError: the template is broken or names a column the row lacks, or its prompt is too long.
        """
        try:
            template = _TEMPLATES.from_string(self.template)
            text = template.render({**row, "prompt": messages[-1]["content"]})
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ConfigError(f"teachers.{self.name}.template: {where}: {error}") from None
        chat = [*messages[:-1], {**messages[-1], "content": text}]
        found = _tokenise(chat, where, config, self.tokenizer, self.options)
        if len(found) > self.max_tokens:
            raise ConfigError(
                f"teachers.{self.name}: {where} has {len(found)} tokens in its template, max_prompt_tokens is "
                f"{self.max_tokens}"
            )
        return found


_TEMPLATES = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


def read_rows(spec: str) -> list[Row]:
    """Rows of a ``.jsonl`` or ``.parquet`` file, or of a ``datasets`` name (``name`` or ``name:split``, split ``train``
    by default).

    Raises:
        ConfigError: the file is missing, unreadable or empty.
    """
    path = Path(spec)
    if path.suffix == ".jsonl":
        rows = list(_read_jsonl(path))
    elif path.suffix == ".parquet" or not path.suffix:
        rows = _read_datasets(path, spec)
    else:
        raise ConfigError(f"prompts: {spec} must be .jsonl, .parquet or the name of a data set")
    if not rows:
        raise ConfigError(f"prompts: {spec} has no rows")
    return rows


def _read_jsonl(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would cut at U+2028 inside a string
    except OSError as error:
        raise ConfigError(f"prompts: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts: {path} is not UTF-8: {error.reason} at byte {error.start}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"prompts: {path}:{number}: is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"prompts: {path}:{number}: must be an object, is {type(row).__name__}")
        yield row


def _read_datasets(path: Path, spec: str) -> list[Row]:
    import datasets

    if path.suffix == ".parquet" and not path.exists():
        raise ConfigError(f"prompts: {path} cannot be read (No such file or directory)")
    try:
        if path.suffix == ".parquet":
            return list(datasets.Dataset.from_parquet(str(path)))
        name, _, split = spec.partition(":")
        return list(datasets.load_dataset(name, split=split or "train"))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"prompts: data set {spec} cannot be loaded: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Rendered and tokenised prompts, and the last message of each as text; ``num_dropped`` were too long."""

    prompts: tuple[PromptSample, ...]
    texts: Mapping[str, str]
    num_dropped: int

    @classmethod
    def load(
        cls,
        spec: str,
        config: PromptsConfig,
        tokenizer: Tokenizer,
        view_of: Callable[[str], TeacherView | None] = lambda source: None,
    ) -> "PromptSet":
        """Read, render and tokenise; ``view_of`` a source is how its teacher reads, where that is another way.

        Raises:
            ConfigError: a row is malformed, an id stands twice, a prompt is too long under ``overlong: error`` or for
            its teacher, or none is left.
        """
        if config.template == "chat" and not tokenizer.chat_template:
            raise ConfigError("prompts.template: chat, but the tokenizer has no chat template; set it to none")
        prompts, texts, dropped = [], dict[str, str](), 0
        for number, row in enumerate(read_rows(spec)):
            prompt_id = str(number if row.get("id") is None else row["id"])
            if prompt_id in texts:
                raise ConfigError(f"prompts: {spec}: id {prompt_id!r} stands twice")
            where = f"{spec}: row {prompt_id}"
            messages = _messages(row, where, config.suffix)
            texts[prompt_id] = messages[-1]["content"]
            token_ids = _tokenise(messages, where, config, tokenizer)
            if len(token_ids) > config.max_tokens:
                if config.overlong == "error":
                    raise ConfigError(
                        f"prompts: {spec}: row {prompt_id} has {len(token_ids)} tokens, prompts.max_tokens is "
                        f"{config.max_tokens}; shorten it, raise the limit, or set prompts.overlong: drop"
                    )
                dropped += 1
                continue
            answer, source = row.get("answer"), str(row.get("source", "default"))
            view = view_of(source)
            prompts.append(
                PromptSample(
                    epoch=0,
                    prompt_id=prompt_id,
                    source=source,
                    token_ids=np.asarray(token_ids, dtype=np.int32),
                    reference_answer=None if answer is None else str(answer),
                    teacher_token_ids=None
                    if view is None
                    else np.asarray(view.token_ids(row, messages, where, config), dtype=np.int32),
                )
            )
        if not prompts:
            raise ConfigError(
                f"prompts: {spec}: all {dropped} rows are longer than prompts.max_tokens {config.max_tokens}"
            )
        return cls(prompts=tuple(prompts), texts=texts, num_dropped=dropped)


def _tokenise(
    messages: Sequence[Mapping[str, str]],
    where: str,
    config: PromptsConfig,
    tokenizer: Tokenizer,
    options: Mapping[str, object] = MappingProxyType({}),
) -> list[int]:
    if config.template == "none":
        if len(messages) != 1:
            raise ConfigError(f"prompts: {where}: a chat of {len(messages)} messages needs prompts.template: chat")
        return _not_empty(tokenizer.encode(messages[0]["content"]), where)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except jinja2.TemplateError as error:
        raise ConfigError(f"prompts: {where}: the chat template refuses it: {error}") from None
    return _not_empty(tokenizer.encode(text, add_special_tokens=False), where)


def _messages(row: Row, where: str, suffix: str) -> list[dict[str, str]]:
    """The row as chat messages, ``suffix`` added to the last one."""
    prompt, messages = row.get("prompt"), row.get("messages")
    if isinstance(prompt, str) and messages is None:
        chat = [{"role": "user", "content": prompt}]
    elif prompt is None and isinstance(messages, list) and messages and all(_is_message(m) for m in messages):
        chat = [{"role": m["role"], "content": m["content"]} for m in messages]
    else:
        raise ConfigError(f"prompts: {where}: needs either `prompt` (text) or `messages` (role and content each)")
    chat[-1]["content"] += suffix
    return chat


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def _not_empty(token_ids: list[int], where: str) -> list[int]:
    if not token_ids:
        raise ConfigError(f"prompts: {where}: is empty")
    return token_ids


class PromptOrder:
    """Which sample comes when: issue number -> prompt of an epoch, and how it is sampled.

    An epoch holds every (prompt, sample_index) once, in an order of its own; the samples of one prompt follow each
    other.
    """

    def __init__(self, prompts: Sequence[PromptSample], *, samples_per_prompt: int, seed: int) -> None:
        self._prompts = prompts
        self._samples = samples_per_prompt
        self._seed = seed
        self._epoch = -1
        self._permutation: Sequence[int] = ()

    def at(self, issue: int) -> tuple[PromptSample, int]:
        """Prompt and sample index of issue number ``issue``."""
        number, sample_index = divmod(issue, self._samples)
        epoch, position = divmod(number, len(self._prompts))
        if epoch != self._epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._epoch, self._permutation = epoch, generator.permutation(len(self._prompts)).tolist()
        prompt = self._prompts[self._permutation[position]]
        return replace(prompt, epoch=epoch), sample_index

    def sampling(self, issue: int, *, temperature: float, max_tokens: int, attempt: int = 0) -> Sampling:
        """A seed of its own for every issue and attempt, the same in every run with this seed."""
        seed = np.random.SeedSequence([self._seed, issue, attempt]).generate_state(1)[0]
        return Sampling(temperature=temperature, max_tokens=max_tokens, seed=int(seed) & 0x7FFFFFFF)
