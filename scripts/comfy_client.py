"""Starts a ComfyUI server and talks to it the way the front end does: HTTP routes and a websocket."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import websocket

from comfy_workflow import Json, find_node, set_widget, to_prompt

__all__ = ["Client", "PromptError", "Server", "find_node", "make_base", "set_widget", "to_prompt"]

MODEL_FOLDERS = ("diffusion_models", "vae", "text_encoders", "loras")
START_TIMEOUT = 600.0
_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy between us and this machine


def make_base(base: Path, pack: Path) -> Path:
    """A ComfyUI base directory of its own, with the pack linked into it as custom_nodes/kinoloom."""
    folders = ["custom_nodes", "input", "output", "temp", "user", *(f"models/{name}" for name in MODEL_FOLDERS)]
    for folder in folders:
        (base / folder).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / "kinoloom"
    if not link.is_symlink():
        link.symlink_to(pack.resolve(), target_is_directory=True)
    return base


class Server:
    """A ComfyUI process on a free port; use it in a `with`. Raises when it dies or cannot import the pack."""

    def __init__(self, comfyui: Path, base: Path, *, log: Path | None = None, args: tuple[str, ...] = ()) -> None:
        self.comfyui = comfyui
        self.base = base
        self.log = log or base / "server.log"
        self.args = args
        self.port = _free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command(), cwd=self.comfyui, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.kill()
            raise

    def command(self) -> list[str]:
        device = [] if _has_cuda() else ["--cpu"]
        return [
            sys.executable, str(self.comfyui / "main.py"), *device,
            "--base-directory", str(self.base), "--database-url", "sqlite:///:memory:",
            "--disable-api-nodes", "--disable-auto-launch", "--port", str(self.port), *self.args,
        ]  # fmt: skip

    def client(self) -> "Client":
        return Client(self.address)

    def stop(self, timeout: float = 30.0) -> None:
        """SIGTERM, then SIGKILL for one that does not go."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL: what a crash looks like to the files on disk."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI exited with {self.process.returncode}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"ComfyUI did not answer within {START_TIMEOUT:.0f} s:\n{self.log_tail()}")
            time.sleep(0.1)
        if "IMPORT FAILED" in self.log.read_text(errors="replace"):
            raise RuntimeError(f"ComfyUI could not import a custom node pack:\n{self.log_tail(80)}")

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
        except OSError:
            return False


class PromptError(RuntimeError):
    """A prompt that the server refused, that failed or that was interrupted; `details` is the server's own account."""

    def __init__(self, message: str, details: Json) -> None:
        super().__init__(message)
        self.details = details


class Client:
    """One front-end session. `events` holds every websocket message so far, oldest first."""

    def __init__(self, address: str, on_event: Callable[[Json], None] | None = None) -> None:
        self.address = address
        self.id = uuid.uuid4().hex
        self.events: list[Json] = []
        self._on_event = on_event
        self._changed = threading.Condition()
        self._closed = False
        self._object_info: Json | None = None
        self._socket = websocket.create_connection(f"ws://{address}/ws?clientId={self.id}", timeout=30)
        self._socket.settimeout(None)
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def get(self, route: str) -> Any:
        """GET a JSON route such as "/queue"."""
        return self._request("GET", route, None)

    def post(self, route: str, data: object = None) -> Any:
        """POST JSON to a route, or nothing; returns the JSON answer, or None for an empty one."""
        return self._request("POST", route, data)

    def jobs(self) -> list[Json]:
        """The pack's training jobs, newest first."""
        return self.get("/kinoloom/jobs?limit=1000")["jobs"]

    def read(self, route: str) -> bytes:
        """GET a route's raw bytes."""
        with _HTTP.open(f"http://{self.address}{route}", timeout=300) as answer:
            return answer.read()

    def object_info(self) -> Json:
        """The server's node definitions; file lists in it are as of the first call."""
        if self._object_info is None:
            self._object_info = self.get("/object_info")
        return self._object_info

    def queue(self) -> Json:
        return self.get("/queue")

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def submit(self, prompt: Json, **extra_data: object) -> str:
        """Queue an API prompt and return its id."""
        body = {"prompt": prompt, "client_id": self.id, "extra_data": extra_data}
        return self.post("/prompt", body)["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 600.0) -> Json:
        """Wait until the prompt is done and return its outputs: node id -> what the node showed."""
        self.wait_event(
            lambda e: e["type"] == "executing" and e["data"] == {"node": None, "prompt_id": prompt_id}, timeout
        )
        entry = self.get(f"/history/{prompt_id}")[prompt_id]
        if entry["status"]["status_str"] != "success":
            raise _failure(entry["status"]["messages"])
        return entry["outputs"]

    def run(self, prompt: Json, timeout: float = 600.0) -> Json:
        return self.wait(self.submit(prompt), timeout)

    def run_workflow(self, workflow: Json, timeout: float = 600.0) -> Json:
        """Run a UI-format workflow."""
        return self.run(to_prompt(workflow, self.object_info()), timeout)

    def wait_event(self, wanted: Callable[[Json], bool], timeout: float = 60.0, start: int = 0) -> Json:
        """The first event from position `start` on that `wanted` accepts, waiting for it if need be."""
        deadline = time.monotonic() + timeout
        position = start
        with self._changed:
            while True:
                while position < len(self.events):
                    event = self.events[position]
                    position += 1
                    if wanted(event):
                        return event
                if self._closed:
                    raise ConnectionError(f"the server at {self.address} closed the websocket")
                if not self._changed.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"no such event within {timeout:.0f} s")

    def files(self, outputs: Json) -> list[str]:
        """The paths, relative to the server's base directory, of the files that a prompt's outputs name."""
        shown = [item for output in outputs.values() for items in output.values() for item in items]
        named = [item for item in shown if isinstance(item, dict) and "filename" in item]
        return [os.path.join(item["type"], item["subfolder"], item["filename"]) for item in named]

    def _listen(self) -> None:
        try:
            while True:
                opcode, message = self._socket.recv_data()
                if opcode == websocket.ABNF.OPCODE_CLOSE:
                    break
                if opcode == websocket.ABNF.OPCODE_TEXT:
                    self._receive(json.loads(message))
        except (websocket.WebSocketException, OSError):
            pass
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _receive(self, event: Json) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()
        if self._on_event is not None:
            self._on_event(event)

    def _request(self, method: str, route: str, data: object) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(
            f"http://{self.address}{route}", body, {"Content-Type": "application/json"}, method=method
        )
        try:
            with _HTTP.open(request, timeout=300) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise _refusal(f"{method} {route}", error) from None
        return json.loads(text) if text else None


def _refusal(what: str, error: urllib.error.HTTPError) -> PromptError:
    text = error.read().decode(errors="replace")
    try:
        details = json.loads(text)
    except ValueError:
        details = {"text": text}
    return PromptError(f"{what}: HTTP {error.code}: {text}", details)


def _failure(messages: list[list]) -> PromptError:
    name, details = next((m for m in messages if m[0] in ("execution_error", "execution_interrupted")), messages[-1])
    where = f"node {details.get('node_id')} ({details.get('node_type')})"
    reason = details.get("exception_message", name)
    return PromptError(f"{where}: {reason}\n{''.join(details.get('traceback', []))}", details)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
