"""The grader ``math`` compares final answers as mathematics, with the math-verify library.

It runs in a process of its own. A short answer can keep sympy busy for hours, and math-verify's own
time-outs raise from a Python handler of SIGALRM: they work in the main thread only, and not before
a long C call has returned. Here they are off, and SIGPROF keeps its default action: the kernel ends
the process at the limit, whatever it is doing, and the next question starts a new one.
"""

import contextlib
import json
import logging
import signal
import subprocess
import sys

from eopd.rewards.final_answer import as_latex, final_answer, is_prose
from eopd.rewards.spelling import are_words_of_the_same_letters, stand_side_by_side
from eopd.rewards.verdict import Verdict, best, each
from eopd.types import Reference


class MathProcess:
    """A math process is a child that runs ``_serve``. It is started when it is first needed, and again
    after it died.
    """

    def __init__(self, time_limit_s: float) -> None:
        self._command = [sys.executable, "-m", __name__, str(time_limit_s)]
        self._process: subprocess.Popen[str] | None = None

    def grade(self, response: str, reference: Reference) -> Verdict:
        r"""Judges whether the final answers of response and reference are equal as mathematics
        (math-verify's ``verify``).

        The final answer is the last box or a last line ``#### ...``; a reference without one is an
        answer as a whole. For a response without one the verdict is ``NO_ANSWER``: in free text
        math-verify 0.9 reads ``3\sqrt{13}`` as 3. Two expressions that it fails to compare are
        ``WRONG``, as it decides itself. Two numbers side by side (``12 34``) are not read.
        """
        answer = as_latex(final_answer(response) or "")
        if not answer:
            return Verdict.NO_ANSWER

        return best(self._compare(answer, accepted) for accepted in each(reference))

    def _compare(self, answer: str, accepted: str) -> Verdict:
        expected = final_answer(accepted)
        expected = as_latex(accepted if expected is None else expected)
        if stand_side_by_side(expected):
            return Verdict.ERROR

        if stand_side_by_side(answer):
            return Verdict.NO_ANSWER

        if are_words_of_the_same_letters(answer, expected):
            return Verdict.WRONG

        return self._ask(json.dumps([answer, expected]))

    def close(self) -> None:
        """Ends the process, which stops at the end of its input."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _ask(self, question: str) -> Verdict:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        # the process may have died while it was idle: then there is no reply either
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(question + "\n")
            process.stdin.flush()

        reply = process.stdout.readline()
        if reply:
            return Verdict(reply.strip())

        self.close()

        return Verdict.TIMEOUT if process.returncode == -signal.SIGPROF else Verdict.ERROR

    def _start(self) -> subprocess.Popen[str]:
        # A session of its own: Ctrl-C in the terminal is for the parent, whose end closes the
        # child's input.
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        if not process.stdout.readline():
            process.communicate()
            raise RuntimeError(
                f"the math grader's process ended at start with code {process.returncode}"
            )

        self._process = process

        return process


def _serve(time_limit_s: float) -> None:
    """Runs the child: it reads a JSON pair (answer, reference) a line, and writes a verdict a line,
    until the input ends.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()  # math-verify warns that its time-outs are off
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply

    extraction = [LatexExtractionConfig(boxed_match_priority=0)]

    def expressions(answer: str) -> list[object]:
        return list(parse(f"\\boxed{{{answer}}}", extraction, parsing_timeout=None))

    def judge(answer: str, reference: str) -> Verdict:
        expected, given = expressions(reference), expressions(answer)
        # math-verify 0.9 reads words as products of letters
        if not expected or is_prose(reference):
            return Verdict.ERROR

        if not given:
            return Verdict.NO_ANSWER

        return Verdict.CORRECT if verify(expected, given, timeout_seconds=None) else Verdict.WRONG

    replies.write("ready\n")
    replies.flush()

    for question in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, time_limit_s)
        verdict = judge(*json.loads(question))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        replies.write(f"{verdict}\n")
        replies.flush()


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
