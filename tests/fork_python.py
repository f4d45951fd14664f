"""A python for shell scripts under test that has imported torch already: it forks at each call.

  python tests/fork_python.py SOCKET [PRELUDE]   # serves until it is ended; PRELUDE is run first

`client(SOCKET)` is the text of the executable that scripts are given as PYTHON.
"""

import os
import pickle
import runpy
import socket
import sys
import traceback
from pathlib import Path


def client(address: str) -> str:
    return f"""#!{sys.executable} -S
import os, pickle, socket, sys
if sys.argv[1].startswith("-"):
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
line = socket.socket(socket.AF_UNIX)
line.connect({address!r})
what = pickle.dumps((sys.argv[1:], os.getcwd(), dict(os.environ)))
socket.send_fds(line, [len(what).to_bytes(4, "big")], [0, 1, 2])
line.sendall(what)
sys.exit(int.from_bytes(line.recv(1), "big"))
"""


def serve(address: str, *prelude: str) -> None:
    import open_clip  # noqa: F401 - what costs seconds to import

    import train  # noqa: F401

    for path in prelude:
        runpy.run_path(path)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        line, _ = listener.accept()
        if os.fork() == 0:
            answer(line)
        line.close()


def answer(line: socket.socket) -> None:
    """Run the call in this child; its child does the work, so that this one can wait for it."""
    head, fds, _, _ = socket.recv_fds(line, 4, 3)
    size, what = int.from_bytes(head, "big"), b""
    while len(what) < size:
        what += line.recv(size - len(what))
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        line.sendall(bytes([status % 256]))
        os._exit(0)
    argv, folder, environment = pickle.loads(what)
    for i, fd in enumerate(fds):
        os.dup2(fd, i)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, code = argv, 0
    sys.path.insert(0, str(Path(argv[0]).parent))  # as python does
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    serve(*sys.argv[1:])
