"""Ctrl-C ends long work, whatever swallows the exception."""

import contextlib
import signal
import threading

import pytest

from jaxopt_models._interrupt import Interrupt, interruptible
from jaxopt_models._progress import bar


@pytest.fixture(autouse=True)
def default_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def swallowed():
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("show", [True, False])
def test_a_bar_raises_what_a_step_swallowed(show):
    steps = []
    with pytest.raises(KeyboardInterrupt), bar("work", 5, show=show) as advance:
        for i in range(5):
            if i == 2:
                swallowed()
            steps.append(i)
            advance()
    assert steps == [0, 1, 2]


def test_it_is_raised_where_it_arrives_and_once():
    with interruptible() as check:
        with pytest.raises(Interrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupt):
            check()
        check()


def test_a_nested_bar_knows_what_came_before_it():
    with pytest.raises(Interrupt), interruptible():
        swallowed()
        with bar("work", 1, show=False) as advance:
            advance()
            pytest.fail("the interrupt was lost")


def test_work_that_ends_before_its_next_step_is_interrupted_too():
    with pytest.raises(Interrupt), interruptible():
        swallowed()


def test_other_handlers_and_threads_are_left_alone():
    came = []
    signal.signal(signal.SIGINT, lambda *_: came.append(1))
    with bar("work", 1, show=False) as advance:
        signal.raise_signal(signal.SIGINT)
        advance()
    assert came == [1]
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def work():
        with bar("work", 1, show=False) as advance:
            advance()
            came.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert came[1:] == [signal.default_int_handler]
