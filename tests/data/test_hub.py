"""The real client against a small server that speaks as much of the hub's language as one download needs."""

import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.data.samples import write_hub_folder

COMMIT = {"main": "a" * 40, "refs%2Fconvert%2Fparquet": "b" * 40}
CLIENT = """
import sys
from gatewright.data import DataConfig, load_images
for name in sys.argv[2:]:
    try:
        splits = load_images(DataConfig(name=name, cache=sys.argv[1]))
        print(len(splits.train), len(splits.holdout), len(splits.test))
    except (ConnectionError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")
"""


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        question = re.match(r"/(api/)?datasets/([\w-]+/[\w-]+)/(revision|tree|resolve)/([^/?]+)/?([^?]*)", self.path)
        _, name, kind, revision, file = question.groups()
        if name == "owner/silent":
            self.server.closing.wait()
        elif name == "owner/missing":
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif kind == "revision" and (name, revision) == ("owner/text", "refs%2Fconvert%2Fparquet"):
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif kind == "revision":
            self.answer(200, body=json.dumps({"id": name, "sha": COMMIT[revision], "siblings": []}).encode())
        elif kind == "tree":
            self.answer(200, body=json.dumps(self.tree(name, revision)).encode())
        else:
            headers = {"X-Repo-Commit": revision, "ETag": f'"{file}"', "Accept-Ranges": "bytes"}
            self.answer(200, headers, (self.server.folder / file).read_bytes())

    def do_HEAD(self):
        self.do_GET()

    def tree(self, name, commit):
        has_parquet = name != "owner/text" and (name != "owner/converted" or commit == "b" * 40)
        files = self.server.folder.glob("train*" if name == "owner/untested" else "*") if has_parquet else []
        return [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]

    def answer(self, status, headers=(), body=b""):
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def hub(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.closing = write_hub_folder(folder), threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def ask(names, home, cache, endpoint, **environment):
    command = [sys.executable, "-c", CLIENT, str(cache), *names]
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(names, done.stdout.splitlines(), strict=True))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hub-cache")


@pytest.fixture(scope="module")
def answers(home, tmp_path_factory):
    with hub(tmp_path_factory.mktemp("hub")) as endpoint:
        names = ["cifar10", "owner/converted", "owner/missing", "owner/text", "owner/silent", "owner/untested"]
        return ask(names, home, tmp_path_factory.mktemp("decoded"), endpoint)


@pytest.mark.parametrize("name", ["cifar10", "owner/converted"])
def test_parquet_files_are_fetched_from_the_data_set_or_its_converted_copy(answers, name):
    assert answers[name] == "18 2 6"


def test_of_a_data_set_without_a_test_split_a_fifth_is_held_out(answers):
    assert answers["owner/untested"] == "14 2 4"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/missing", "ValueError: the hub has no data set owner/missing, or shows it to members only"),
        ("owner/text", "ValueError: the hub has no parquet files of owner/text: download it yourself"),
        ("owner/silent", r"ConnectionError: owner/silent cannot be fetched from the Hugging Face hub \(.*timed out"),
    ],
)
def test_what_the_hub_does_not_have_or_say(answers, name, message):
    assert re.match(message, answers[name])


@pytest.mark.usefixtures("answers")
def test_without_a_hub_there_are_earlier_downloads_and_local_alternatives(home, tmp_path):
    nobody = "http://127.0.0.1:9"
    answers = ask(["cifar10", "cifar100"], home, tmp_path, nobody)
    assert answers["cifar10"] == "18 2 6"
    assert answers["cifar100"].startswith("ConnectionError: uoft-cs/cifar100 cannot be fetched")
    for alternative in ("`data.path` to a folder of parquet files", "`data.name=folder`", "`data.name=digits`"):
        assert alternative in answers["cifar100"]
