"""The models that read along: in the cluster, or behind a server."""

from typing import Annotated, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from eopd.config.base import (
    AbsolutePath,
    Actors,
    Cpus,
    Gpus,
    Names,
    NativeOptions,
    PromptText,
    Seconds,
    Section,
    Temperature,
    Threads,
    Tokens,
    refuse,
    require_gpus_for_workers,
)
from eopd.config.rollout import OWNED_BY_ENGINES

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
EntropyBound = Literal["low", "high", "mid"]

NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
NAME_WORDS: Final = "letters, digits, '.', '_' and '-', of which the first is a letter or digit"

OWNED_BY_TEACHER: Final = {
    **OWNED_BY_ENGINES,
    "runner": "a teacher reads and does not write",
    "skip_tokenizer_init": "a teacher is asked with token ids",
}
_RENDERED: Final = "the prompt's messages are rendered, and the answer is to follow"
OWNED_BY_TEMPLATE: Final = dict.fromkeys(
    ("conversation", "messages", "tools", "tokenize", "add_generation_prompt"), _RENDERED
)


def _root_of_a_server(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("names no host and port; write it as http://host:8000") from None

    _, v1, rest = f"{parts.path}/".partition("/v1/")
    if v1:
        raise ValueError(f"must be the root of the server: leave {(v1 + rest).rstrip('/')} off")

    return url


Url = Annotated[
    str,
    Field(
        pattern=r"^https?://[^/?#@\s]+(/[^?#\s]*)?$",
        description="the root of a server, as http://host:8000, without user, key, ? or #",
    ),
    AfterValidator(_root_of_a_server),
]
VARIABLE: Final = r"^[A-Za-z_][A-Za-z0-9_]*$"
VARIABLE_WORDS: Final = (
    "the name of an environment variable, which holds the key, and not the key itself"
)


class ServerConfig(Section):
    """Where a teacher is served over HTTP. ``model`` is the name it is served under.

    ``api_key_env`` names the environment variable that holds the key, which is thus in no file and
    no log. ``timeout_s`` is that of one request, ``max_attempts`` of a trajectory's, with growing
    pauses between them.
    """

    url: Url
    model: str | None = Field(None, min_length=1)
    api_key_env: str | None = Field(None, pattern=VARIABLE, description=VARIABLE_WORDS)
    max_connections: int = Field(32, ge=1, le=10_000)
    timeout_s: Seconds = 90.0
    max_attempts: int = Field(6, ge=1, le=1_000_000)


class TeacherConfig(Section):
    """A model that reads along: ``vllm`` in the cluster, ``openai`` any server that returns
    ``prompt_logprobs``, ``eopd`` the server of ``eopd teacher serve``.

    ``model`` is its Hugging Face directory; a served one needs no weights there, only configuration
    and tokenizer. ``sources`` are the sources of prompts it teaches; without any it teaches those
    that no other teacher does.
    ``dtype: auto`` is chosen when the config is loaded, and ``dtype_reason`` says why.
    ``head_dtype: float32`` keeps a float32 copy of the head and is exact; ``model`` projects in the
    model's own precision. ``template`` makes of a row of the data a prompt that only this teacher
    sees: Jinja for the last text of the user; ``template_options`` go to its chat template.
    ``entropy_bound`` is what the gate reads where only bounds on the entropy are known.
    ``eos_remap`` maps the student's end tokens to the teacher's. A trajectory not scored within
    ``timeout_s`` is tried elsewhere. ``vllm`` goes to the engine untouched.
    """

    name: str = Field("teacher", pattern=NAME, max_length=200, description=NAME_WORDS)
    backend: Literal["vllm", "openai", "eopd"] = "vllm"
    model: AbsolutePath
    server: ServerConfig | None = None
    sources: Names = ()
    replicas: Actors = 1
    dtype: Dtype = "auto"
    dtype_reason: str | None = None
    head_dtype: Literal["float32", "model"] = "float32"
    temperature: Temperature = 1.0
    entropy_bound: EntropyBound = "mid"
    eos_remap: dict[int, int] = {}
    template: PromptText | None = None
    template_options: NativeOptions = {}
    max_prompt_tokens: Tokens | None = None
    timeout_s: Seconds = 600.0
    cpus: Cpus = 1.0
    gpus: Gpus = 0.0
    threads: Threads = 1
    vllm: NativeOptions = {}

    @model_validator(mode="after")
    def _ours_stay_ours(self) -> Self:
        refuse("vllm", self.vllm, OWNED_BY_TEACHER)
        refuse("template_options", self.template_options, OWNED_BY_TEMPLATE)
        require_gpus_for_workers(self.gpus, self.vllm)
        return self

    @model_validator(mode="after")
    def _backend_fits(self) -> Self:
        if (self.server is None) != (self.backend == "vllm"):
            needed = "needs a server section" if self.server is None else "takes no server section"
            raise ValueError(f"backend: {self.backend} {needed}")

        if self.backend != "vllm" and self.vllm:
            raise ValueError(
                f"vllm: must be empty with backend {self.backend}, whose server has its own options"
            )

        if self.backend != "vllm" and self.gpus:
            raise ValueError(
                f"gpus: must be 0 with backend {self.backend}, whose server has its own (is "
                f"{self.gpus:g})"
            )

        if self.backend == "openai" and self.temperature != 1.0:
            raise ValueError(
                f"temperature: must be 1 with backend openai (is {self.temperature:g}); the "
                "prompt log-probabilities of a stock server are always those at 1"
            )

        if self.template is None and self.template_options:
            raise ValueError("template_options: are of a teacher with a template")

        if self.template is None and self.max_prompt_tokens:
            raise ValueError("max_prompt_tokens: is of a teacher with a template")

        if self.server is not None and self.backend == "openai" and self.server.model is None:
            raise ValueError(
                "server.model: is required with backend openai: the name the model is served under"
            )

        return self

    @property
    def logits_are_rounded(self) -> bool:
        """Whether the head answers in the model's own precision, as stock servers do."""
        return self.backend == "openai" or self.head_dtype == "model"
