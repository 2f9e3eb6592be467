"""SIGTERM and Ctrl-C as wishes that a loop reads between its steps."""

import os
import signal


class StopSignal:
    """SIGTERM or SIGINT as a wish to read at step boundaries: `number` is 0 before there is one.

    A second Ctrl-C stops at once."""

    def __init__(self, active):
        self.active, self.number = active, 0

    def __enter__(self):
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame):
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if self.active:  # print() is not safe in here: it may have been interrupted itself
            name, more = signal.Signals(number).name, "; Ctrl-C again stops at once"
            text = f"{name}: saving after this step{more if number == signal.SIGINT else ''}\n"
            os.write(2, text.encode())

    def status(self):
        """The exit status of a run that was stopped, 128 + signal as shells have it: not 0, so
        that Slurm and torchrun do not take it for finished, and unlike that of an error."""
        return 128 + (self.number or signal.SIGTERM)  # another rank may have got it

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)
