"""Make the pictures of the README from a finished run: ``python docs/pictures.py runs/NAME``.

Needs Debian's ``chromium`` and the packages of the ``dev`` extra. Pictures come from real runs
alone: this program draws nothing itself, it cuts two pieces out of ``report.html``.
"""

import argparse
import base64
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "contract"))

from browser import Page, chromium  # noqa: E402  (it drives Chromium for the report's tests, too)

WIDTH, HEIGHT, MARGIN = 960, 1400, 8
NUM_CURVES = 4  # two rows of the page

# Top and bottom of the visible ones of some elements, counted from the top of the page.
PIECE = """(() => {
  const boxes = [...document.querySelectorAll(%s)].map((element) => element.getBoundingClientRect());
  const seen = boxes.filter((box) => box.height);
  return [Math.min(...seen.map((box) => box.top)), Math.max(...seen.map((box) => box.bottom))].map((y) => y + scrollY);
})()"""

# Mark the last token at which the gate is open, or else the last one.
LAST_OPEN_TOKEN = """(() => {
  const tokens = [...document.querySelectorAll(%s)];
  (tokens.findLast((token) => token.classList.contains("open")) ?? tokens.at(-1)).dataset.pictured = "";
})()"""


def main() -> None:
    """Write ``docs/pictures/tokens.png`` and ``docs/pictures/curves.png``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run, e.g. runs/demo")
    parser.add_argument(
        "--prompt", type=int, default=1, help="which prompt of the report, counted from 1"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures")
    arguments = parser.parse_args()

    report = arguments.run / "report.html"
    if not report.is_file():
        parser.error(f"{report}: is missing; write it with: eopd report {arguments.run}")
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as page:
        page.open(report, width=WIDTH, height=HEIGHT)
        picture_tokens(page, arguments.prompt, arguments.output / "tokens.png")
        picture_curves(page, arguments.output / "curves.png")


def picture_tokens(page: Page, prompt: int, target: Path) -> None:
    """Cut out the scale and one prompt with its answers, the pointer on a token with an open
    gate.
    """
    page.value(
        "document.querySelectorAll('#tokens .prompt').forEach((one, i) => one.hidden "
        f"= i !== {prompt - 1})"
    )
    # room for the card
    page.value("document.querySelector('#tokens').style.marginBottom = '600px'")
    article = "#tokens .prompt:not([hidden])"
    page.value(LAST_OPEN_TOKEN % json.dumps(f"{article} .response:last-child .tokens span"))
    page.point_at("[data-pictured]")
    cut(page, ["#tokens .scale.by-entropy-only", article, "#card"], target)


def picture_curves(page: Page, target: Path) -> None:
    """Cut out the first curves."""
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)  # no card, no readout
    page.value("document.querySelector('#curves .grid').scrollIntoView()")
    cut(page, [f"#curves .grid > :nth-child(-n+{NUM_CURVES})"], target)


def cut(page: Page, selectors: list[str], target: Path) -> None:
    """Write the part of the page that holds these elements as a PNG."""
    page.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    top, bottom = page.value(PIECE % json.dumps(", ".join(selectors)))
    clip = {
        "x": 0,
        "y": top - MARGIN,
        "width": WIDTH,
        "height": bottom - top + 2 * MARGIN,
        "scale": 1,
    }
    data = page.send("Page.captureScreenshot", clip=clip)["data"]
    target.write_bytes(base64.b64decode(data))


if __name__ == "__main__":
    main()
