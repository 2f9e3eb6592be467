"""nanoswitch/tune.py: the search on loss curves that are known, with kills and divergence."""

import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest

from nanoswitch import sweep, tune


class FakeJob:
    """A run whose loss is a known function of its value; `trained` counts who ran it."""

    def __init__(self, folder, loss, trained):
        self.folder, self.loss, self.trained = folder, loss, trained

    def run(self):
        if not (self.folder / "done").exists():
            return None
        return SimpleNamespace(finished=True, last=lambda key: self.loss)

    def train(self):
        self.folder.mkdir(parents=True)
        self.trained.append(self.folder.name)
        if math.isfinite(self.loss):
            (self.folder / "done").touch()
        else:
            text = "error: the loss or gradient was NaN or infinite 5 steps in a row: run again\n"
            (self.folder / "output.txt").write_text(text)


def searches(tmp_path, trained, base=0.001, **losses):
    def of(name, loss):
        def job(value):
            return FakeJob(tmp_path / name / str(value), loss(value), trained)

        return tune.Search(base, job)

    return {name: of(name, loss) for name, loss in losses.items()}


def train(jobs):
    for job in jobs:
        job.train()


def valley(bottom):
    return lambda value: 4 + math.log(value / bottom) ** 2


@pytest.mark.parametrize("bottom", [0.001, 0.0014, 0.0001, 0.008])
def test_the_best_of_a_valley_is_found_and_lies_inside(tmp_path, bottom):
    found = searches(tmp_path, trained := [], a=valley(bottom))
    tune.search(found, train)
    result = found["a"].result()
    assert result["inside"] and abs(math.log2(result["best"] / bottom)) < 0.26
    values = sorted(result["losses"])
    assert values[0] < result["best"] < values[-1]  # widened until then, and no further
    assert len(trained) == len(set(trained)) == len(values)
    steps = [math.log2(b / a) for a, b in itertools.pairwise(values)]
    assert steps == pytest.approx([0.5] * len(steps), abs=0.01)
    assert len(values) <= 3 + 2 * abs(math.log2(bottom / 0.001)) + 1


def test_across_a_flat_valley_the_own_value_stays(tmp_path):
    """A slope of 0.002 a factor of 2 is less than what two seeds differ by."""
    found = searches(tmp_path, trained := [], a=lambda value: 4 - 0.002 * math.log2(value))
    tune.search(found, train)
    assert found["a"].result()["best"] == 0.001 and len(trained) == 3


def test_a_killed_search_goes_on_without_a_run_lost_or_repeated(tmp_path):
    whole = searches(tmp_path / "whole", [], a=valley(0.004), b=valley(0.0005))
    tune.search(whole, train)
    trained = []

    def killed(jobs):
        for job in jobs[:1]:
            job.train()
        raise KeyboardInterrupt

    for _ in range(40):
        again = searches(tmp_path / "killed", trained, a=valley(0.004), b=valley(0.0005))
        try:
            tune.search(again, killed)
        except KeyboardInterrupt:
            continue
        break
    assert {k: v.result() for k, v in again.items()} == {k: v.result() for k, v in whole.items()}
    assert len(trained) == sum(len(one.losses) for one in whole.values())


def test_a_rate_that_diverges_is_worst_and_is_not_tried_again(tmp_path):
    def loss(value):
        return math.inf if value > 0.0011 else valley(0.0003)(value)

    for _ in range(2):
        found = searches(tmp_path, trained := [], a=loss)
        tune.search(found, train)
        assert [path.name for path in tmp_path.rglob("diverged")] == []  # to look leaves no mark
    assert not trained and found["a"].result()["losses"][0.00141] is None
    assert found["a"].result()["best"] == pytest.approx(0.0003, rel=0.2)


def test_a_run_that_diverges_is_marked_by_what_trained_it(tmp_path, monkeypatch):
    """And a copy of its folder without its output is known by the mark."""
    words = "the loss or gradient was NaN or infinite 5 steps in a row"
    code = f"import sys; sys.exit('error: {words}')"

    def start(job, at_once):
        job.folder.mkdir()
        with open(job.folder / "output.txt", "w") as output:
            job.process = subprocess.Popen([sys.executable, "-c", code], stderr=output)

    monkeypatch.setattr(sweep, "start", start)
    job = sweep.Job("a", tmp_path / "run", [], {})
    assert sweep.sweep([job], 1) == [f"{job.folder}: error: {words}"]
    (job.folder / "output.txt").unlink()
    assert tune.loss_of(job) == math.inf


def test_whole_numbers_and_edges_end(tmp_path):
    found = searches(tmp_path, [], base=2, a=lambda value: float(value))
    tune.search(found, train)
    assert found["a"].result()["best"] == 1  # 0 is none, and 1 is tried once
    found = searches(tmp_path, [], b=lambda value: -1e4 * value)
    tune.search(found, train)
    result = found["b"].result()
    assert not result["inside"] and len(result["losses"]) == tune.MOST


def test_an_unfinished_search_has_no_best(tmp_path):
    found = searches(tmp_path, [], a=valley(0.001))
    tune.search(found, lambda jobs: train(jobs[:2]))
    assert found["a"].result()["best"] is None and len(found["a"].losses) == 2


@pytest.mark.parametrize("base, small", [(1, [1, 2, 3]), (2, [1, 2, 3, 4]), (10, [5, 7, 10, 14])])
def test_whole_numbers_are_tried_once_each(tmp_path, base, small):
    values = [tune.Search(base, None).value(place) for place in range(-2, 12)]
    assert len({*values}) == len(values) and {*small} <= {*values} and base in values
    found = searches(tmp_path, trained := [], base=base, a=lambda value: 4 - math.log(value) / 9)
    tune.search(found, train)
    result = found["a"].result()
    assert len(trained) == len({*trained}) and not result["inside"]  # more is always better here
    assert result["best"] == max(v for v, loss in result["losses"].items() if loss is not None)
