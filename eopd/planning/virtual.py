"""Virtual time: an event loop whose clock jumps.

Where an ordinary loop waits for its next timer, this one sets its clock to that timer's time. Hours
of a run pass in seconds, every order of events is that of real sleeps, and it is the same in every
run, since there is one thread and no real clock.
"""

import asyncio
import selectors


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that never waits: the time that it is asked to wait for has passed at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything in the simulation waits for something else of it")

        self.now += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time, which begins at 0 and is in seconds."""

    def __init__(self) -> None:
        self._selector_of_time = _JumpingSelector()
        super().__init__(self._selector_of_time)

    def time(self) -> float:
        """Returns the virtual seconds since the loop was made."""
        return self._selector_of_time.now
