"""The processes of a run of scripts/bench-vs-qemu: none of them outlives it."""

import os
import select
import signal
import subprocess
import tempfile

# For one client, one server's end, one check: a hang ends the run, not a slow disk.
DEADLINE_S = 3600


class Failed(Exception):
    """The run cannot go on; the message is for the user."""


class Children:
    """Every process that runs, so that none outlives the run.

    A signal is noted when it comes and acted upon where this class waits, so that it can never fall between the start of
    a process and the note that it was started.
    """

    def __init__(self):
        self.running = {}
        self.signal = None
        self.woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.note)

    def note(self, number, _frame):
        self.signal = number

    def check(self):
        if self.signal is not None:
            raise Failed(f"stopped by {signal.Signals(self.signal).name}")

    def start(self, argv, output, cwd=None):
        """Starts a program, in a session of its own: Ctrl-C in a terminal must reach this process alone."""
        self.check()
        try:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=cwd,
                                       start_new_session=True)
        except OSError as error:
            raise Failed(f"{argv[0]}: {error.strerror}") from error
        self.running[process.pid] = process
        return process

    def wait(self, process):
        """Waits for the end of a program and returns its status, as soon as it ends: no polling that would be timed."""
        # Who asks whether it is alive may have found its end before.
        if process.returncode is None:
            descriptor = os.pidfd_open(process.pid)
            try:
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                poll.register(self.woken, select.POLLIN)
                ended = poll.poll(DEADLINE_S * 1000)
            finally:
                os.close(descriptor)
            self.check()
            if not ended:
                raise Failed(f"{process.args[0]} did not end within {DEADLINE_S} s")
        status = process.wait()
        del self.running[process.pid]
        return status

    def run(self, argv, cwd=None):
        """Runs a program to its end; returns its status and all that it printed."""
        with tempfile.TemporaryFile() as output:
            status = self.wait(self.start(argv, output, cwd))
            output.seek(0)
            return status, output.read().decode(errors="replace").strip()

    def succeed(self, argv, cwd=None):
        """Runs a program that must succeed; returns what it printed."""
        status, said = self.run(argv, cwd)
        if status != 0:
            raise Failed(f"{' '.join(map(str, argv))}: status {status}\n{said}")
        return said

    def kill(self):
        """Ends everything, with whatever it has started."""
        for process in self.running.values():
            # One that was waited for already has given up its number.
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.running.clear()
