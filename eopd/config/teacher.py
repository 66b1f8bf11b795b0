"""The models that read along: in the cluster, or behind a server."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from eopd.config.base import AbsolutePath, NativeOptions, Section, refuse

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
EntropyBound = Literal["low", "high", "mid"]
# One name may stand for a list of one.
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]

OWNED_BY_ENGINES = ("model", "dtype", "max_model_len", "enable_prefix_caching")
OWNED_BY_TEACHER = (*OWNED_BY_ENGINES, "runner", "skip_tokenizer_init")
OWNED_BY_ROWS = ("conversation", "messages", "tools", "tokenize", "add_generation_prompt")  # of a chat template


class ServerConfig(Section):
    """Where a teacher is served over HTTP. ``model`` is the name it is served under.

    ``api_key_env`` names the environment variable that holds the key, which is thus in no file and no log.
    ``timeout_s`` is that of one request, ``max_attempts`` of a trajectory's, with growing pauses between them.
    """

    url: str = Field(pattern=r"^https?://[^/?#@]+(/[^?#]*)?$")
    model: str | None = None
    api_key_env: str | None = None
    max_connections: int = Field(32, ge=1)
    timeout_s: float = Field(90.0, gt=0.0)
    max_attempts: int = Field(6, ge=1)


class TeacherConfig(Section):
    """A model that reads along: ``vllm`` in the cluster, ``openai`` any server that returns ``prompt_logprobs``,
    ``eopd`` the server of ``eopd teacher serve``.

    ``model`` is its Hugging Face directory; a served one needs no weights there, only configuration and tokenizer.
    ``sources`` are the sources of prompts it teaches; without any it teaches those that no other teacher does.
    ``dtype: auto`` is chosen when the config is loaded, and ``dtype_reason`` says why.
    ``head_dtype: float32`` keeps a float32 copy of the head and is exact; ``model`` projects in the model's own
    precision. ``template`` makes of a row of the data a prompt that only this teacher sees: Jinja for the last
    text of the user; ``template_options`` go to its chat template. ``entropy_bound`` is what the gate reads where only
    bounds on the entropy are known. ``eos_remap`` maps the student's end tokens to the teacher's. A trajectory not
    scored within ``timeout_s`` is tried elsewhere. ``vllm`` goes to the engine untouched.
    """

    name: str = Field("teacher", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    backend: Literal["vllm", "openai", "eopd"] = "vllm"
    model: AbsolutePath
    server: ServerConfig | None = None
    sources: Names = ()
    replicas: int = Field(1, ge=1)
    dtype: Dtype = "auto"
    dtype_reason: str | None = None
    head_dtype: Literal["float32", "model"] = "float32"
    temperature: float = Field(1.0, gt=0.0)
    entropy_bound: EntropyBound = "mid"
    eos_remap: dict[int, int] = {}
    template: str | None = None
    template_options: NativeOptions = {}
    max_prompt_tokens: int | None = Field(None, ge=1)
    timeout_s: float = Field(600.0, gt=0.0)
    cpus: float = Field(1.0, ge=0.0)
    gpus: float = Field(0.0, ge=0.0)
    threads: int = Field(1, ge=1)
    vllm: NativeOptions = {}

    @model_validator(mode="after")
    def _ours_stay_ours(self) -> Self:
        refuse("vllm", self.vllm, OWNED_BY_TEACHER)
        refuse("template_options", self.template_options, OWNED_BY_ROWS)
        return self

    @model_validator(mode="after")
    def _backend_fits(self) -> Self:
        if (self.server is None) != (self.backend == "vllm"):
            needed = "needs a server section" if self.server is None else "takes no server section"
            raise ValueError(f"backend {self.backend}: {needed}")
        if self.backend != "vllm" and self.vllm:
            raise ValueError(f"backend {self.backend}: takes no vllm options; its server has its own")
        if self.backend == "openai" and self.temperature != 1.0:
            raise ValueError(
                f"temperature {self.temperature:g}: prompt log-probabilities of a stock server are always those at 1"
            )
        if self.template is None and (self.template_options or self.max_prompt_tokens):
            raise ValueError("template_options, max_prompt_tokens: are of a teacher with a template")
        if self.server is not None and self.backend == "openai" and self.server.model is None:
            raise ValueError("server.model: backend openai needs the name the model is served under")
        return self

    @property
    def logits_are_rounded(self) -> bool:
        """Whether the head answers in the model's own precision, as stock servers do."""
        return self.backend == "openai" or self.head_dtype == "model"
