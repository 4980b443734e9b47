"""A real MLflow server, and what it was told."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.request

from tests.train.runs import wait_until


class Server:
    """A real `mlflow server` on loopback that can be killed and started again on the same port."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.process = None

    def launch(self):
        arguments = {
            "--host": "127.0.0.1",
            "--port": self.uri.rpartition(":")[2],
            "--workers": "1",
            "--backend-store-uri": f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination": f"{self.folder}/artifacts",
        }
        flat = [word for pair in arguments.items() for word in pair]
        with (self.folder / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *flat],
                cwd=self.folder,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start(self):
        if self.process is None:
            self.launch()
        wait_until(self.answers)

    def answers(self):
        """Whether its store answers, which a server that says it is healthy may only then begin to open."""
        assert self.process.poll() is None, (self.folder / "log.txt").read_text()
        question = f"{self.uri}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
        with contextlib.suppress(OSError), urllib.request.urlopen(question, timeout=30) as response:
            return response.status == 200
        return False

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def kill(self):
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


def history(client, run_id, name):
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
