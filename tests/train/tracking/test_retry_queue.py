import threading

from gatewright.train.tracking.retry_queue import CAPACITY, RetryQueue


def queue_of(send):
    limits = {"metrics": 1000}
    return RetryQueue(send, "nowhere", limits=limits, is_refusal=lambda error: isinstance(error, LookupError))


def test_a_full_queue_counts_what_it_drops():
    delivered = []
    gate = threading.Event()

    def send(kind, payloads):
        gate.wait()
        delivered.extend(payloads)

    queue = queue_of(send)
    queue.put("metrics", range(CAPACITY + 10))
    queue.put("metrics", [0])
    gate.set()
    assert queue.close() == {"metrics": 11}
    assert delivered == list(range(CAPACITY))


def test_nobody_waits_for_a_send_that_does_not_return(monkeypatch):
    monkeypatch.setattr("gatewright.train.tracking.retry_queue.BUSY_SECONDS", 0.1)
    gate = threading.Event()
    queue = queue_of(lambda kind, payloads: gate.wait())
    queue.put("metrics", [1, 2, 3])
    assert queue.close(("end of run", "FINISHED")) == {"metrics": 3, "end of run": 1}
    gate.set()


def test_files_that_fail_let_metrics_pass():
    delivered = []

    def send(kind, payloads):
        if kind == "files" and not delivered:
            raise PermissionError("read-only")
        delivered.extend(payloads)

    queue = queue_of(send)
    queue.put("files", ["a.png"])
    queue.put("metrics", [1, 2])
    assert queue.close() == {}
    assert delivered == [1, 2, "a.png"]


def test_a_refused_item_does_not_take_its_batch_along():
    delivered = []

    def send(kind, payloads):
        if 13 in payloads:
            raise LookupError("unlucky")
        delivered.extend(payloads)

    queue = queue_of(send)
    queue.put("metrics", range(50))
    assert queue.close() == {"metrics": 1}
    assert delivered == [number for number in range(50) if number != 13]
