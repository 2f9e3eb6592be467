"""run_dir/best: which checkpoint has the lowest validation loss, and for how long it has had it."""

import math

from nanoswitch.checkpoints import find_damage, name_in, name_latest


class Best:
    """The lowest validation loss after a step of training, from the log and from then on.

    step, loss: the lowest; waited: validations since then. All ranks hold the same of these. named,
    kept: the step whose checkpoint run_dir/best names, and its loss; for the first rank alone. It
    follows the lowest loss of the steps that have a checkpoint: a run with patience saves one at
    each lowest."""

    def __init__(self, run, log, ranks):
        self.run, self.log, self.first = run, log, ranks.first
        self.step, self.loss, self.waited = 0, math.inf, 0
        for step, loss in sorted(log.validated.items()):
            self.falls(step, loss)
        self.named = self.recover(log.validated) if self.first else 0
        self.kept = log.validated.get(self.named, math.inf)
        self.catch_up(log.validated)
        if ranks.world > 1:  # the first rank's are everyone's
            numbers = ranks.sum(*((self.step, self.loss, self.waited) if self.first else (0, 0, 0)))
            self.step, self.loss, self.waited = int(numbers[0]), numbers[1], int(numbers[2])

    def recover(self, losses):
        """The step that the file names; 0, and no file, where that checkpoint is not whole or the
        log, cut back to an older one, has no loss of it."""
        file, name = self.run / "best", name_in(self.run / "best")
        steps = {f"step_{step:06d}": step for step in losses}
        if not name:
            return 0
        damage = f"{file} names {name[:40]!r}, of which the log has no loss"
        damage = find_damage(self.run / name) if name in steps else damage
        if damage:
            self.log.say(f"warning: {damage}; the best checkpoint is to be found anew")
            file.unlink()
            return 0
        return steps[name]

    def catch_up(self, losses):
        """Name the best whole checkpoint where a kill, or damage, kept the file from it."""
        for step in sorted(losses, key=losses.get) if self.first else []:
            folder = self.run / f"step_{step:06d}"
            if losses[step] >= self.kept:
                return
            if folder.is_dir() and not find_damage(folder):
                self.name(step, losses[step])

    def falls(self, step, loss):
        """Count a validation (loss None: there was none) -> whether it is the lowest so far."""
        if loss is None or not step:
            return False
        lower = loss < self.loss
        self.waited = 0 if lower else self.waited + 1
        if lower:
            self.step, self.loss = step, loss
        return lower

    def name(self, step, loss):
        """Have run_dir/best name this step if it has a checkpoint, of a loss below all others'."""
        folder = self.run / f"step_{step:06d}"
        if self.first and loss is not None and loss < self.kept and folder.is_dir():
            self.log.attempt("best", name_latest, self.run, folder, "best")
            self.named, self.kept = step, loss

    def __str__(self):
        return f"no loss below step {self.step}'s {self.loss:.4f} in {self.waited} validations"
