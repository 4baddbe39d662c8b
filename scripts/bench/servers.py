"""The servers that scripts/bench-vs-qemu compares, and how each is started and ended."""

import dataclasses
import socket
import tempfile
import time

from bench.processes import Failed
from bench.report import DIRECT, OURS, RAW, SHIPPED, SINK

GREETING_S = 15


@dataclasses.dataclass(frozen=True)
class Kind:
    """A server: which format its images have, if any, and how it is started."""

    name: str
    format: str
    argv: object


def kinds(blockyard, direct, sink):
    def qemu(*options):
        # As many clients as ours lets in by itself; with one, nbdcopy would be kept to one connection.
        return lambda path, image, _size: ["qemu-nbd", "-t", "-f", "qcow2", "-e", "16", "-k", path, *options, image]

    found = [
        Kind(OURS, "qcow2", lambda path, image, _size: [blockyard, "nbd", "--quiet", "--socket", path, image]),
        Kind(SHIPPED, "qcow2", qemu()),
        Kind(DIRECT, "qcow2", qemu(*direct)),
        Kind(RAW, "raw", lambda path, image, _size: ["nbdkit", "-f", "-U", path, "file", image]),
    ]
    if sink:
        # Without extents: a client that reads would see one hole, and ask for nothing.
        null = ["--filter=noextents", "null"]
        found.append(Kind(SINK, None, lambda path, _image, size: ["nbdkit", "-f", "-U", path, *null, str(size)]))
    return found


class Server:
    """A running server for one image, ready for clients."""

    def __init__(self, children, sockets, kind, image, size):
        self.children, self.name = children, kind.name
        folder = tempfile.mkdtemp(dir=sockets)
        path = f"{folder}/nbd"
        self.uri = f"nbd+unix:///?socket={path}"
        self.log = open(f"{folder}/log", "w+b")
        self.process = children.start(kind.argv(path, image, size), self.log)
        deadline = time.monotonic() + GREETING_S
        while not greets(path):
            children.check()
            if self.process.poll() is not None:
                raise Failed(f"{self.name} ended at once\n{self.said()}")
            if time.monotonic() > deadline:
                raise Failed(f"{self.name} did not greet within {GREETING_S} s\n{self.said()}")
            time.sleep(0.01)

    def said(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace").strip()[-2000:]

    def ask_to_end(self):
        self.process.terminate()

    def wait(self):
        status = self.children.wait(self.process)
        if status != 0:
            raise Failed(f"{self.name} ended with status {status}\n{self.said()}")
        self.log.close()


def greets(path):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        try:
            client.connect(path)
            return client.recv(16, socket.MSG_WAITALL) == b"NBDMAGICIHAVEOPT"
        except OSError:
            return False
