import signal
import threading

import pytest

from gatewright.train.launch.signals import STOPPING, Interrupted, StopRequest


@pytest.fixture(params=STOPPING, ids=lambda number: number.name)
def heard(request):
    """A signal, and how often this process, and not the run, was told of it."""
    told = []
    before = signal.signal(request.param, lambda number, frame: told.append(number))
    yield request.param, told
    signal.signal(request.param, before)


def test_the_first_signal_is_remembered_and_the_second_is_as_usual(heard):
    number, told = heard
    with StopRequest() as stop:
        assert stop.signal_number is None
        signal.raise_signal(number)
        assert (stop.signal_number, told) == (number, [])
        signal.raise_signal(number)
        assert told == [number]


def test_everything_is_as_before_at_the_end(heard):
    number, told = heard
    with pytest.raises(Interrupted, match="how to go on") as caught, StopRequest():
        raise Interrupted("how to go on", number)
    assert caught.value.signal_number == number
    signal.raise_signal(number)
    assert told == [number]


def test_a_run_in_another_thread_leaves_signals_alone(heard):
    number, told = heard
    inside, outside = threading.Event(), threading.Event()

    def run():
        with StopRequest():
            inside.set()
            outside.wait(30)

    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(30)
    signal.raise_signal(number)
    outside.set()
    thread.join()
    assert told == [number]
