"""A run's numbers on their way from the device to the log, and what is shown of them."""

import time

import torch

from nanoswitch.counts import flops_per_token
from nanoswitch.device import peak_flops


def moment(device):
    """A moment of a device's work: on a card not the host's, which may be a step ahead."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin, end):
    """Of two moments that have been."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def launched(numbers):
    """Numbers (n,) on a device that may still be at work on them, on their way to the host -> a
    function that waits for them only, not for what the device was given later -> n floats; and the
    moment when they are there."""
    device = numbers.device
    numbers = numbers.to("cpu", non_blocking=device.type == "cuda")
    arrived = moment(device)

    def read():
        if device.type == "cuda":
            arrived.synchronize()
        return numbers.tolist()

    return read, arrived


def due(every, done, last):
    return done == last or (every and done % every == 0)


class Meter:
    """Takes the steps' numbers from the device to the log.

    waiting: steps done or under way, (number, function that reads its numbers, moment of its end).
    A card is at its next step while the host reads those of the one before."""

    def __init__(self, trainer, log, start):
        self.trainer, self.log, self.first = trainer, log, start + 1
        self.waiting, self.begin, self.average = [], moment(trainer.device), None
        self.peak, self.flops = peak_flops(trainer.device), flops_per_token(trainer.model)

    def read(self, ends=False):
        """Log the steps but the last, and that too on CPU, if something else is due after it or the
        run ends there -> whether any rank was told to stop."""
        config, (done, *_), stop = self.trainer.config, self.waiting[-1], False
        intervals = (
            config.eval_every, config.hellaswag_every, config.sample_every, config.checkpoint_every,
        )  # fmt: skip
        now = ends or self.trainer.device.type != "cuda"
        now = now or any(due(every, done, self.trainer.max_steps) for every in intervals)
        while self.waiting and (now or stop or len(self.waiting) > 1):
            stop = self.report(*self.waiting.pop(0)) or stop
        return stop

    def report(self, done, read, end):
        config, last = self.trainer.config, self.trainer.max_steps
        loss, norm, stop = read()
        seconds, self.begin = seconds_between(self.begin, end), end
        self.average = 0.9 * (self.average or seconds) + 0.1 * seconds
        rate, speed = self.trainer.rate(done - 1), config.total_batch_tokens / seconds
        world = self.trainer.ranks.world
        mfu = self.flops * speed / (self.peak * world) if self.peak else None
        note = self.log.step(
            step=done, train_loss=loss, lr=rate, grad_norm=norm,
            tokens=done * config.total_batch_tokens, tok_per_s=speed, mfu=mfu,
        )  # fmt: skip
        if done == self.first or note or due(config.print_every, done, last):
            usage = f" mfu {mfu:.0%}" if mfu else ""
            note = note or f"{usage} eta {clock(self.average * (last - done))}"  # 80 columns
            power = f"{rate:.1e}".replace("e-0", "e-")
            self.log.say(
                f"{done:>5}/{last} loss {loss:.4f} lr {power} norm {norm:.2f} "
                f"{short(speed)} tok/s{note}"
            )
        self.log.check_skipped(self.trainer.scaler.is_enabled())
        return bool(stop)

    def skip_pause(self):
        """Leave what came after the last step out of the next one's time."""
        if not self.waiting:
            self.begin = moment(self.trainer.device)


def markdown(head, rows):
    """A table's head and rows, lists of texts -> Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def short(number):
    """1234567 -> 1.23M, 65432 -> 65.4k: three digits that fit a progress line; B for billions."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            number /= size
            return f"{number:.3g}{unit}" if number < 999.5 else f"{number:.0f}{unit}"
    return f"{number:.0f}"


def clock(seconds):
    """7509 -> 2h05m, 200000 -> 2d07h: the two largest units."""
    sizes, units, seconds = (86400, 3600, 60, 1), "dhms", int(seconds)
    i = next((i for i, size in enumerate(sizes[:2]) if seconds >= size), 2)
    large, rest = divmod(seconds, sizes[i])
    return f"{large}{units[i]}{rest // sizes[i + 1]:02d}{units[i + 1]}"
