"""The page to try a model on, over real HTTP."""

import http.client
import json
import signal
import threading
from contextlib import contextmanager

import pytest

from gatewright.cli.serve import answered
from gatewright.report.server import LARGEST, Server
from gatewright.train import load_run
from tests.train.runs import finish, start


@contextmanager
def serving(run):
    trained = load_run(run)
    with Server(lambda upload: answered(trained, upload), title="<b>", item=trained.task.item, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method, path, body=None, **headers):
    """The status of an answer, and what it says."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, json.loads(content) if "json" in reply.headers["Content-Type"] else content.decode()


def test_an_image_is_answered_as_predict_answers_it_and_what_is_none_by_a_sentence(gatewright, trained):
    image = trained / "examples" / "3.png"
    predicted = json.loads(gatewright("predict", trained, image, "--json", "--top", 5)[1])
    with serving(trained) as server:
        assert server.address == f"http://127.0.0.1:{server.server_port}"
        status, page = ask(server, "GET", "/")
        assert (status, "Drop an image here" in page, "<h1>&lt;b&gt;</h1>" in page) == (200, True, True)
        status, found = ask(server, "POST", "/ask", image.read_bytes())
        assert (status, found) == (200, {name: value for name, value in predicted.items() if name != "file"})
        status, found = ask(server, "POST", "/ask", b"no image")
        assert (status, list(found)) == (400, ["error"])
        assert found["error"].startswith("This file of 8 bytes cannot be read as an image. Choose another")
        too_long = {"Content-Length": str(LARGEST["image"] + 1)}
        assert ask(server, "POST", "/ask", None, **too_long) == (
            413,
            {"error": "An upload has at most 10,485,760 bytes; this one has 10,485,761."},
        )
        assert ask(server, "POST", "/ask", None, **{"Content-Length": "-1"})[0] == 411
        assert ask(server, "POST", "/elsewhere", b"")[0] == ask(server, "GET", "/elsewhere")[0] == 404
        assert ask(server, "GET", "/", Host="elsewhere.example:80")[0] == 403
        assert ask(server, "POST", "/ask", image.read_bytes())[0] == 200  # It goes on after all of these.


def test_a_text_is_gone_on_with(text_run):
    with serving(text_run[1]) as server:
        assert "the model writes on" in ask(server, "GET", "/")[1]
        status, found = ask(server, "POST", "/ask", "line 1ü".encode())
        assert status == 200
        assert found["text"].startswith("line 1ü")
        assert len(found["text"]) > 20
        for name in ("blocks.0.ffn", "blocks.1.ffn"):
            assert sum(each["weight"] for each in found["experts"][name]) > 0


def test_what_cannot_be_served_is_refused(gatewright, trained):
    with serving(trained) as server:
        status, _, errors = gatewright("serve", trained, "--port", server.server_port)
        assert (status, errors.count("\n")) == (2, 1)
        assert "Address already in use. Name another port or host." in errors
    assert "is a number from 0 to 65535; got 70000." in gatewright("serve", trained, "--port", 70000)[2]
    assert "No run at nowhere" in gatewright("serve", "nowhere")[2]


@pytest.mark.distributed
def test_ctrl_c_ends_it_in_peace(trained, tmp_path):
    process = start("serve", trained, "--port", "0", folder=tmp_path)
    line = process.stdout.readline()
    assert line.startswith(f"Serving {trained} at http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    assert finish(process) == (0, "Stopped.\n", "")
