"""A fork server for runs that are to be killed: it has imported everything, so that a run costs its work and not the imports.

Reads a JSON object a line on stdin, forks a child that runs the command line, answers with one on stdout when the child has ended.

    {arguments, cwd, events, moment?, signal?, seconds?, most_bytes?}  ->  {status, out, err, cpu}

`moment`: [event, occurrence]: just before that occurrence of the event, the child sends itself the signal. `seconds`: after so long the
child gets it from here. `most_bytes`: the kernel kills the child in the midst of the write that would make any file longer. `events`: a
file to which the child writes a line for each event. An event is a change of the file system in `cwd` by Python code, as text:
`rename data/train/index.parquet`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOMS = ("kdprune_data", "kdprune_pipelines", "kdprune_cli")
TORCH = ("kdprune_data.learn", "kdprune_data.scores")
LATE = ("pyarrow.parquet", "pyarrow.ipc", "simplejpeg")
"""What is imported only when it is used."""
LEARNING = ("torch._dynamo", "torchvision.models", "safetensors.torch")
"""The same, by what learns."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Watch:
    """An audit hook that counts the events, notes them, and sends the signal when its moment has come."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._root = os.path.realpath(request["cwd"]) + os.sep
        self._moment = tuple(request.get("moment") or ())
        self._signal = request.get("signal", signal.SIGKILL)
        self._seen: Counter[str] = Counter()
        self._file = os.open(request["events"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._mutex = threading.Lock()
        self._main = threading.main_thread()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        text = self._describe(event, arguments)
        if text is None:
            return
        with self._mutex:
            self._seen[text] += 1
            here = (text, self._seen[text])
            os.write(self._file, f"{json.dumps(here)}\n".encode())
        if here == self._moment:
            os.kill(os.getpid(), self._signal)
            if self._signal != signal.SIGKILL and threading.current_thread() is not self._main:
                time.sleep(0.2)  # signals are for the main thread: let it have this one before the work goes on

    def _describe(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        """The event as text, None for one that changes nothing here."""
        if event == "open":
            path, _, flags = arguments
            return self._named("open", path) if isinstance(flags, int) and flags & WRITES else None
        if event == "os.rename":
            return self._named("rename", arguments[1])
        if event in ("os.mkdir", "os.remove", "os.rmdir"):
            folder = arguments[-1]
            verb = event.removeprefix("os.")
            return f"{verb} {os.fsdecode(arguments[0])}" if folder not in (-1, None) else self._named(verb, arguments[0])
        if event in ("os.truncate", "os.link", "os.symlink", "shutil.rmtree"):
            return self._named(event, arguments[0] if event in ("os.truncate", "shutil.rmtree") else arguments[1])
        return None

    def _named(self, verb: str, path: Any) -> str | None:
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        whole = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - links are not followed
        return f"{verb} {whole.removeprefix(self._root)}" if whole.startswith(self._root) else None


def load(*, learning: bool) -> None:
    """Import everything; start no thread. `learning`: with torch, and what needs it. Without, the process is small, and forked at once."""
    for room in ROOMS:
        package = importlib.import_module(room)
        for module in pkgutil.walk_packages(package.__path__, f"{room}."):
            if learning or not module.name.startswith(TORCH):
                importlib.import_module(module.name)
    for name in (*LATE, *(LEARNING if learning else ())):
        importlib.import_module(name)
    from PIL import Image

    Image.init()
    if learning:
        import torch

        from kdprune_data.learn import loop

        torch.set_num_threads(1)
        loop.SAVE_EVERY, loop.SAVE_SHARE = -1.0, 0.0  # a checkpoint whenever there may be one


def run(request: dict[str, Any], folder: Path) -> int:
    """The child: run the command line as its process would. Returns the exit code."""
    from kdprune_cli.main import main

    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.chdir(request["cwd"])
    if most := request.get("most_bytes"):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    sys.addaudithook(Watch(request))
    try:
        main(request["arguments"])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def serve(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fork a child for a request, and wait for it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = run(request, folder)
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    if "seconds" in request:
        time.sleep(request["seconds"])
        os.kill(child, request.get("signal", signal.SIGKILL))
    _, status, used = os.wait4(child, 0)
    out, err = ((folder / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))
    return {"status": os.waitstatus_to_exitcode(status), "out": out, "err": err, "cpu": used.ru_utime + used.ru_stime}


def listen() -> None:
    """Serve until stdin ends."""
    load(learning="learning" in sys.argv[2:])
    gc.freeze()  # or each child would go through all of it, and copy it
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line), folder)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    listen()
