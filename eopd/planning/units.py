"""Sizes and rates of options, as people write them."""

import re
from typing import Final

from eopd.config import ConfigError

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")
_BYTES: Final = {
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_BITS: Final = {"Mbit": 10**6, "Gbit": 10**9}
_STAGES: Final = ("generate", "score", "train")


def read_bytes(option: str, text: str) -> int:
    """Reads a size such as ``80GB`` or ``40GiB``.

    Raises:
        ConfigError: it is no number above 0 with a known unit.
    """
    return _read(option, text, _BYTES, "80GB")


def read_bandwidth(option: str, text: str) -> float:
    """Reads a bandwidth such as ``100Gbit`` or ``25GB``, a second each; returns bytes a second.

    Raises:
        ConfigError: it is no number above 0 with a known unit.
    """
    bytes_of_bits = {unit: size // 8 for unit, size in _BITS.items()}
    return float(_read(option, text, _BYTES | bytes_of_bits, "100Gbit"))


def _read(option: str, text: str, units: dict[str, int], example: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] not in units:
        raise ConfigError(
            f"{option} {text}: must be a number and one of {', '.join(units)}, as in {example}"
        )

    size = int(float(match[1]) * units[match[2]])
    if size < 1:
        raise ConfigError(f"{option} {text}: must be above 0")

    return size


def read_rates(option: str, text: str) -> dict[str, float]:
    """Reads ``generate=900,score=2500,train=700``: response tokens a second of one engine, one
    replica of a teacher, and one rank.

    Raises:
        ConfigError: one of the three is missing, stands twice, is unknown, or is no number above 0.
    """
    rates: dict[str, float] = {}
    for part in text.split(","):
        stage, _, number = (piece.strip() for piece in part.partition("="))
        if stage not in _STAGES:
            raise ConfigError(f"{option}: {stage!r} is none of {', '.join(_STAGES)}")

        if stage in rates:
            raise ConfigError(f"{option}: {stage} stands twice")

        if not re.fullmatch(r"\d+(\.\d+)?", number) or float(number) == 0.0:
            raise ConfigError(
                f"{option}: {stage} must be response tokens a second, above 0 (is {number!r})"
            )

        rates[stage] = float(number)

    if missing := [stage for stage in _STAGES if stage not in rates]:
        raise ConfigError(
            f"{option}: lacks {', '.join(missing)}; `eopd profile CONFIG` measures all three"
        )

    return rates


def read_scale(option: str, text: str) -> list[int]:
    """Reads ``8..4096``: 8, 16, 32 and so on, up to 4,096.

    Raises:
        ConfigError: it is no such range of whole numbers above 0.
    """
    match = re.fullmatch(r"(\d+)\.\.(\d+)", text.strip())
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < first <= last:
        raise ConfigError(
            f"{option} {text}: must be the fewest and the most devices, as in 8..4096"
        )

    sizes = [first]
    while sizes[-1] * 2 <= last:
        sizes.append(sizes[-1] * 2)

    return sizes
