"""Options of the command line that are mappings: ``--vllm max_num_seqs=64``, or YAML."""

from collections.abc import Sequence
from typing import cast

from pydantic import BaseModel

from eopd.config import ConfigError
from eopd.config.document import DocumentError, read_value
from eopd.config.shape import shape


def read_mapping(
    option: str, texts: Sequence[str], section: type[BaseModel], example: str
) -> dict[str, object]:
    """Reads what an option was given, as the key of the same name of a config's section is read.

    Each text is ``KEY=VALUE``, or a YAML mapping. A key that is given again counts as it was given
    last.

    Args:
        option: the option, such as ``--template-options``.
        texts: what it was given, each time.
        section: the section that has the key, such as ``template_options``.
        example: a mapping, for messages.

    Raises:
        ConfigError: a text is neither, or a value can be read in two ways.
    """
    tree: dict[str, object] = {}
    for text in texts:
        tree |= _read(option, text, example)

    key = option.removeprefix("--").replace("-", "_")
    shaped, faults = shape({key: tree}, section)
    if faults:
        lines = [f"{'.'.join([option, *place[1:]])}: {fault}" for place, fault in faults.items()]
        raise ConfigError("\n".join(lines))

    return cast(dict[str, dict[str, object]], shaped)[key]


def _read(option: str, text: str, example: str) -> dict[str, object]:
    must = f"{option} {text}: must be a YAML mapping, e.g. {example}"
    name, equals, value = text.partition("=")
    try:
        tree = {name: read_value(value)} if equals and name.isidentifier() else read_value(text)
    except DocumentError as error:
        raise ConfigError(f"{must}; this {error}") from None

    if not isinstance(tree, dict):
        raise ConfigError(must)

    return tree
