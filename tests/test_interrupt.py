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


def test_it_is_raised_where_it_arrives_and_again_until_it_leaves_the_block():
    with pytest.raises(KeyboardInterrupt), interruptible() as check:
        swallowed()
        with pytest.raises(KeyboardInterrupt):
            check()
        check()
        signal.raise_signal(signal.SIGINT)


def test_what_left_a_bar_is_not_raised_again():
    with interruptible() as check:
        with pytest.raises(KeyboardInterrupt), bar("work", 1, show=False):
            signal.raise_signal(signal.SIGINT)
        check()


def test_the_outermost_block_chooses_the_class():
    for kind in (Interrupt, KeyboardInterrupt):
        quiet = bar("work", 1, show=False)
        with pytest.raises(KeyboardInterrupt) as caught, interruptible(kind), quiet:
            signal.raise_signal(signal.SIGINT)
        assert caught.type is kind


def test_a_handler_that_was_left_behind_is_taken_up_anew():
    with interruptible():
        ours = signal.getsignal(signal.SIGINT)
    ours.arrived = True
    signal.signal(signal.SIGINT, ours)
    with interruptible() as check:
        check()


def test_a_nested_bar_knows_what_came_before_it():
    with pytest.raises(KeyboardInterrupt), interruptible():
        swallowed()
        with bar("work", 1, show=False) as advance:
            advance()
            pytest.fail("the interrupt was lost")


def test_other_handlers_and_threads_are_left_alone():
    came = []
    signal.signal(signal.SIGINT, lambda *_: came.append(1))
    with bar("work", 1, show=False) as advance:
        signal.raise_signal(signal.SIGINT)
        advance()
    assert came == [1]
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("outer", [contextlib.nullcontext, interruptible])
def test_bars_in_other_threads_are_left_alone(outer):
    came = []

    def work():
        with bar("work", 1, show=False) as advance:
            advance()
            came.append(signal.getsignal(signal.SIGINT))

    with contextlib.suppress(KeyboardInterrupt), outer() as check:
        if check is not None:
            swallowed()
        handler = signal.getsignal(signal.SIGINT)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if check is not None:
            check()
            pytest.fail("the thread took the interrupt of the main one")
    assert came == [handler]
