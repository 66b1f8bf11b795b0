"""The models that read along: in the cluster, or behind a server."""

from typing import Annotated, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from eopd.config.base import (
    Actors,
    Cpus,
    Gpus,
    ModelSpec,
    Names,
    NativeOptions,
    NodeLabels,
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


def _one_to_one(remap: dict[int, int]) -> dict[int, int]:
    if wrong := [token for pair in remap.items() for token in pair if token < 0]:
        raise ValueError(f"{wrong[0]} is no token id")

    back = {theirs: own for own, theirs in remap.items()}
    for own, theirs in remap.items():
        if back[theirs] != own:
            raise ValueError(
                f"{own} and {back[theirs]} both become {theirs}, which has one way back only"
            )

    return remap


VARIABLE: Final = r"^[A-Za-z_][A-Za-z0-9_]*$"
VARIABLE_WORDS: Final = (
    "the name of an environment variable, which holds the key, and not the key itself"
)


class ServerConfig(Section):
    """The server of a teacher whose backend is ``openai`` or ``eopd``."""

    url: Url
    """The root of the server, such as ``http://host:8000``, without ``/v1``."""

    model: str | None = Field(None, min_length=1)
    """The name under which the server serves the model. The backend ``openai`` needs it."""

    api_key_env: str | None = Field(None, pattern=VARIABLE, description=VARIABLE_WORDS)
    """The environment variable that holds the key, which is thus in no file and no log. It is
    read on the node where the client runs, so set it on every node; ``eopd submit`` hands it on.
    ``null`` sends no key.
    """

    max_connections: int = Field(32, ge=1, le=10_000)
    """The number of requests that may be in flight; the others wait."""

    timeout_s: Seconds = 90.0
    """The seconds of one request."""

    max_attempts: int = Field(6, ge=1, le=1_000_000)
    """The number of attempts at one request. Between two of them lies a random pause of up to 1, 2,
    4, ... 30 s, some 15 s in all: raise it for a server that may be away for longer.
    """


class TeacherConfig(Section):
    """A model that reads along: it gives its log-probabilities and its entropy at every token that
    the student wrote.

    A teacher runs in the cluster or stands behind a server. The chapter
    docs/configuration.md#teachers-in-a-cluster-and-behind-servers has examples.
    """

    name: str = Field("teacher", pattern=NAME, max_length=200, description=NAME_WORDS)
    """The name of the teacher in metrics and messages. Several teachers need different ones."""

    backend: Literal["vllm", "openai", "eopd"] = "vllm"
    """Where the teacher runs. ``vllm`` is an engine in the cluster, ``openai`` any server that
    returns ``prompt_logprobs``, ``eopd`` the server of ``eopd teacher serve``. Servers need
    ``teachers[].server``.
    """

    model: ModelSpec
    """The teacher: a Hugging Face directory, or a model on the Hub as for ``student.model``. It
    shares the student's vocabulary. Of a teacher behind a server configuration and tokenizer are
    enough.
    """

    server: ServerConfig | None = None
    """The server of a teacher with the backend ``openai`` or ``eopd``; ``null`` with ``vllm``."""

    sources: Names = ()
    """The sources of prompts that this teacher teaches. One teacher may name none: it teaches
    every source that no other one names.
    """

    replicas: Actors = 1
    """The number of engines of this teacher, or of clients of its server."""

    dtype: Dtype = "auto"
    """The precision of the teacher. ``auto`` is chosen when the config is loaded, as for the
    student; it is bfloat16 for a teacher behind a server.
    """

    dtype_reason: str | None = None
    """Why ``auto`` chose the precision it did. The program writes it; leave it out."""

    head_dtype: Literal["float32", "model"] = "float32"
    """The precision in which the head computes logits. ``float32`` is exact, and on CPUs keeps a
    float32 copy of the head; ``model`` computes in the model's own precision, which is faster and
    good enough for a gate.
    """

    temperature: Temperature = 1.0
    """Divides the teacher's logits. The student is sampled at ``rollout.temperature`` and pulled
    towards the teacher at this one: set both alike unless you mean to sharpen or flatten the
    student.
    """

    entropy_bound: EntropyBound = "mid"
    """What the gate reads where only bounds on the teacher's entropy are known (backend
    ``openai``): the lower one, the upper one, or the middle of the two.
    """

    eos_remap: Annotated[dict[int, int], AfterValidator(_one_to_one)] = {}
    """The end tokens of the student and those of the teacher that stand for them, as
    ``{student id: teacher id}``. ``eopd check`` proposes it where it is needed.
    """

    template: PromptText | None = None
    """Makes a prompt that only this teacher sees: Jinja for the last text of the user, with the
    columns of the data row and ``prompt``, the student's text. ``null`` shows the teacher the
    student's prompt.
    """

    template_options: NativeOptions = {}
    """Options of the teacher's chat template, for a teacher with a ``template``."""

    max_prompt_tokens: Tokens | None = None
    """The longest prompt of a teacher with a ``template``, in tokens. ``null`` takes
    ``prompts.max_tokens``.
    """

    timeout_s: Seconds = 600.0
    """The seconds in which a replica must score a trajectory. After them it is pinged. One that
    does not answer is replaced, and its trajectories go to other replicas; if it answers, the
    trajectory itself has failed and is sampled again.
    """

    cpus: Cpus = 1.0
    """The CPUs of one replica, which Ray reserves; a fraction is allowed."""

    gpus: Gpus = 0.0
    """The GPUs of one replica, which Ray reserves: ``tensor_parallel_size`` x
    ``pipeline_parallel_size`` of ``teachers[].vllm``, or a share of one GPU. 0 runs on CPUs, with
    vLLM's build for them, or behind a server.
    """

    threads: Threads = 1
    """The compute threads of one replica, which are never taken from Ray."""

    node_labels: NodeLabels = {}
    """The labels that a machine must have for a replica, such as ``{ray.io/accelerator-type: H100}``,
    which Ray gives by itself, or those of ``ray start --labels``. With none, any machine will do.
    """

    vllm: NativeOptions = {}
    """Options of vLLM's engine, which go to it untouched. Those that the numbers rest on, such as
    ``model`` and ``dtype``, are refused, and the message says which key decides instead. A teacher
    behind a server has none.
    """

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
