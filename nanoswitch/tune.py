"""Each config's own best value of a flag, by one rule for all: factors of sqrt(2) around its own
value, one seed, widened until the best is inside. Of values within FLAT of the least loss the one
nearest to the own value is the best: across a flat valley the noise of a seed would walk far.
What a kill left is continued: every value is a run folder, and the rule reads nothing but logs."""

import math
from dataclasses import dataclass, field

from nanoswitch.log import DIVERGED, DIVERGED_MARK
from nanoswitch.sweep import last_line

STEP = math.sqrt(2)
MOST = 13  # values of one config: factors of 64 in all
FLAT = 0.005  # nats; the seeds of one config differ by more


@dataclass
class Search:
    """The search of one config. base: its own value; job(value): the run that tries it, None where
    the flag cannot have it; losses: {place: loss} of base x sqrt(2)^place, infinite where training
    diverged or cannot be."""

    base: float
    job: object
    losses: dict = field(default_factory=dict)

    def value(self, place):
        """Three digits: a value that folders and flags can name. No whole number comes twice."""
        value = self.base * STEP**place
        if isinstance(self.base, int):
            further = max if place > 0 else min
            return further(round(value), self.base + place)
        return self.base if not place else float(f"{value:.3g}")

    @property
    def best(self):
        """The place nearest to the base with the least loss or FLAT above it, the lower one of two
        that are as near; None before there is any."""
        least = min(self.losses.values(), default=None)
        good = [at for at in sorted(self.losses) if self.losses[at] <= least + FLAT]
        return min(good, key=abs, default=None)

    def wanted(self):
        """The places to try next; none once the best is inside."""
        if self.best is None:
            return [-1, 0, 1]
        missing = [place for place in (-1, 0, 1) if place not in self.losses]
        if missing or len(self.losses) >= MOST:
            return missing
        return [at for at in (self.best - 1, self.best + 1) if at not in self.losses]

    @property
    def inside(self):
        return self.best is not None and not self.wanted() and len(self.losses) < MOST

    def result(self):
        """For results.json; best is None while the search is not done."""
        values = {self.value(at): loss for at, loss in sorted(self.losses.items())}
        known = {value: loss if math.isfinite(loss) else None for value, loss in values.items()}
        done = self.best is not None and not self.wanted()
        best = self.value(self.best) if done else None
        return {"best": best, "base": self.base, "inside": self.inside, "losses": known}


def loss_of(job):
    """A run's last validation loss; infinite where it diverged, None where it is not finished."""
    run = job.run()
    if run and run.finished:
        return run.last("val_loss")
    marked = (job.folder / DIVERGED_MARK).exists()  # what it said stays on the machine that ran it
    return math.inf if marked or DIVERGED in last_line(job.folder / "output.txt") else None


def search(searches, train):
    """Do the searches {name: Search} side by side, each as far as it comes. train([Job]) trains
    what is not done."""
    tried = set()  # what failed is not trained again, and does not hold up the other searches
    while True:
        jobs, known = [], 0
        for one in searches.values():
            for place in one.wanted():
                value = one.value(place)
                job = one.job(value) if value > 0 else None
                if job is None:
                    one.losses[place] = math.inf
                    known += 1
                else:
                    jobs.append((one, place, job))
        todo = [job for *_, job in jobs if loss_of(job) is None and job.folder not in tried]
        tried |= {job.folder for job in todo}
        if todo:
            train(todo)
        for one, place, job in jobs:
            if (loss := loss_of(job)) is not None:
                one.losses[place] = loss
                known += 1
        if not known:
            return  # all done, or the same command continues
