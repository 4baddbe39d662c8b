"""What scripts/bench-vs-qemu lets clients do, what images hold before, and the bytes that they must hold afterwards."""

import dataclasses
import os
import random
import shutil
import sys

MIB = 1 << 20

# One write in flight, and a connection that is there and does nothing.
ONE_IN_FLIGHT = """
import nbd, sys
busy, idle = nbd.NBD(), nbd.NBD()
busy.connect_uri(sys.argv[1])
idle.connect_uri(sys.argv[1])
offset = 0
with open(sys.argv[2], "rb") as source:
    while data := source.read(32 << 20):
        busy.pwrite(data, offset)
        offset += len(data)
busy.flush()
busy.shutdown()
idle.shutdown()
"""


def copy(uri, raw):
    return ["nbdcopy", "--flush", raw, uri]


def one_in_flight(uri, raw):
    return [sys.executable, "-c", ONE_IN_FLIGHT, uri, raw]


def convert(uri, raw):
    return ["qemu-img", "convert", "-n", "-W", "-m", "8", "-t", "writeback", "-f", "raw", "-O", "raw", raw, uri]


def read(uri, _raw):
    return ["nbdcopy", uri, "null:"]


def fio(target, size, block, written):
    """Writes at random places, none twice. Each block holds its offset, and the seed is fixed: fio leaves the same bytes
    in a plain file, which is what an image is compared with."""
    return ["fio", "--name=bench", *target, "--rw=randwrite", f"--bs={block}", f"--size={size}", f"--io_size={written}",
            "--end_fsync=1", "--randseed=1", "--verify=pattern", "--verify_pattern=0x5a%o", "--do_verify=0",
            "--verify_state_save=0"]


def fio_4k(target, size):
    return fio(target, size, 4096, size // 4)


def fio_64k(target, size):
    return fio(target, size, 65536, size)


def over_nbd(job):
    return lambda uri, raw: job(["--ioengine=nbd", f"--uri={uri}", "--iodepth=16"], os.path.getsize(raw))


@dataclasses.dataclass(frozen=True)
class Workload:
    name: str
    what: str
    # What an image holds before: nothing, all of `full.raw` in itself, or that in its backing file.
    before: str
    # The raw file that each image reads as afterwards; where a client copies, it copies that.
    after: tuple
    client: object


WORKLOADS = [
    Workload("seq", "nbdcopy of a full disk", "empty", ("full.raw",), copy),
    Workload("sparse", "nbdcopy of a disk of 8 times the size, an eighth of it data", "empty", ("sparse.raw",), copy),
    Workload("one", "one 32 MiB write in flight, a second connection idle", "empty", ("full.raw",), one_in_flight),
    Workload("convert", "qemu-img convert -n -W -m 8 of a full disk", "empty", ("full.raw",), convert),
    Workload("rand4k", "random 4 KiB writes into an empty image", "empty", ("rand4k.raw",), over_nbd(fio_4k)),
    Workload("rand64k", "random 64 KiB writes into an empty image", "empty", ("rand64k.raw",), over_nbd(fio_64k)),
    Workload("overlay4k", "random 4 KiB writes over a full backing image", "overlay", ("over4k.raw",), over_nbd(fio_4k)),
    Workload("overwrite4k", "random 4 KiB writes over allocated clusters", "full", ("over4k.raw",), over_nbd(fio_4k)),
    Workload("read", "nbdcopy of a full image to null:", "full", ("full.raw",), read),
    Workload("disks4", "four nbdcopy at once, a quarter of the size each", "empty",
             tuple(f"part{number}.raw" for number in range(4)), copy),
]


class Inputs:
    """The files that the images are made from and compared with, each made when it is first asked for."""

    def __init__(self, children, folder, size):
        self.children, self.folder, self.size = children, folder, size

    def path(self, name):
        path = f"{self.folder}/{name}"
        if not os.path.exists(path):
            print(f"making {name}", file=sys.stderr)
            self.make(name, path)
        return path

    def make(self, name, path):
        if name == "full.qcow2":
            self.children.succeed(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.path("full.raw"), path])
        elif name == "full.raw":
            self.fill(path, 1, self.size, MIB)
        elif name == "sparse.raw":
            self.fill(path, 2, self.size * 8, 8 * MIB)
        elif name.startswith("part"):
            self.fill(path, name, self.size // 4, MIB)
        else:
            if name == "over4k.raw":
                shutil.copyfile(self.path("full.raw"), path)
            else:
                empty(path, self.size)
            job = fio_64k if name == "rand64k.raw" else fio_4k
            self.children.succeed(job(["--ioengine=psync", f"--filename={path}"], self.size), self.folder)

    def fill(self, path, seed, length, step):
        """1 MiB of random bytes at every step, holes between."""
        source = random.Random(seed)
        empty(path, length)
        with open(path, "r+b") as file:
            for offset in range(0, length, step):
                self.children.check()
                file.seek(offset)
                file.write(source.randbytes(MIB))


def empty(path, length):
    with open(path, "wb") as file:
        file.truncate(length)


def drop_from_cache(path):
    """Lets the file be read from the disk. Its pages have to be clean for that."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bring_into_cache(path):
    """Reads all data of the file, but not its holes."""
    with open(path, "rb", buffering=0) as file:
        length, offset, buffer = os.path.getsize(path), 0, bytearray(MIB)
        while offset < length:
            try:
                offset = file.seek(offset, os.SEEK_DATA)
            except OSError:  # no data behind this place
                break
            offset += file.readinto(buffer)
