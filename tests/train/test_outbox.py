import threading

import pytest

from gatewright.train.tracking.retry_queue import CAPACITY, Outbox


def test_a_full_outbox_counts_what_it_drops():
    delivered = []
    gate = threading.Event()

    def send(kind, payloads):
        gate.wait()
        delivered.extend(payloads)

    outbox = Outbox(send, "nowhere")
    outbox.put("metrics", range(CAPACITY + 10))
    outbox.put("metrics", [0])
    gate.set()
    assert outbox.close() == {"metrics": 11}
    assert delivered == list(range(CAPACITY))


def test_nobody_waits_for_a_send_that_does_not_return(monkeypatch):
    monkeypatch.setattr("gatewright.train.tracking.retry_queue.BUSY_SECONDS", 0.1)
    gate = threading.Event()
    outbox = Outbox(lambda kind, payloads: gate.wait(), "nowhere")
    outbox.put("metrics", [1, 2, 3])
    assert outbox.close(("end of run", "FINISHED")) == {"metrics": 3, "end of run": 1}
    gate.set()


def test_files_that_fail_let_metrics_pass():
    delivered = []

    def send(kind, payloads):
        if kind == "files" and not delivered:
            raise PermissionError("read-only")
        delivered.extend(payloads)

    outbox = Outbox(send, "nowhere")
    outbox.put("files", ["a.png"])
    outbox.put("metrics", [1, 2])
    assert outbox.close() == {}
    assert delivered == [1, 2, "a.png"]


def test_a_refused_item_does_not_take_its_batch_along():
    exceptions = pytest.importorskip("mlflow.exceptions")
    delivered = []

    def send(kind, payloads):
        if 13 in payloads:
            raise exceptions.MlflowException("unlucky", error_code=1000)
        delivered.extend(payloads)

    outbox = Outbox(send, "nowhere")
    outbox.put("metrics", range(50))
    assert outbox.close() == {"metrics": 1}
    assert delivered == [number for number in range(50) if number != 13]
