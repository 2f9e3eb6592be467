"""Weights & Biases and trackio, beside the log."""

import contextlib
import os
import secrets

from nanoswitch.files import write_beside


class Tracker:
    """Sends what the log gets to a package of wandb's interface too, as one run there however often
    this one is continued. Whatever fails in it costs a warning, and training goes on without.

    ModuleNotFoundError, before anything is done, when the package is missing."""

    def __init__(self, folder, say):
        try:
            self.module = self.package()
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"--{self.name} true needs {self.name}: pip install {self.name} ({error})"
            ) from None
        self.folder, self.say, self.run = folder, say, None

    def attempt(self, call, *args):
        if not self.module:
            return
        try:
            call(*args)
        except Exception as error:  # of any kind: it talks to another process, and to a server
            if isinstance(error, ConnectionError):  # its process died: it shall not wait for it
                with contextlib.suppress(Exception, SystemExit):
                    self.module.teardown()
            self.module, reason = None, (str(error).splitlines() or [""])[0]
            key = os.environ.get("WANDB_API_KEY") or None
            reason = f"{type(error).__name__}: {reason.replace(key, '***') if key else reason}"
            self.say(f"warning: {self.name} failed ({reason}); training goes on without it")

    def identity(self):
        """A name that this run keeps when it is continued."""
        path = self.folder / f"{self.name}_id"
        if not path.is_file():
            with write_beside(str(path)) as file:
                file.write(secrets.token_hex(8).encode())
        return path.read_text().strip()

    def write(self, entry):
        if "config" in entry:
            about = {name: entry[name] for name in entry.keys() - {"config", "event", "step"}}
            return self.start(entry["config"] | about)
        if "samples" in entry:
            rows = [[entry["step"], text] for text in entry["samples"]]
            entry["samples"] = self.module.Table(columns=["step", "text"], data=rows)
        self.log({name: value for name, value in entry.items() if value is not None})


class Wandb(Tracker):
    name = "wandb"

    @staticmethod
    def package():
        import wandb

        return wandb

    def start(self, about):
        # neither the terminal's lines nor git's remote, whose address may hold a password
        quiet = self.module.Settings(console="off", disable_git=True, save_code=False, quiet=True)
        self.run = self.module.init(
            project=os.environ.get("WANDB_PROJECT", "nanoswitch"), name=self.folder.resolve().name,
            id=self.identity(), resume="allow", dir=self.folder, settings=quiet,
        )  # fmt: skip
        self.run.config.update(about, allow_val_change=True)
        # not wandb's own count, which takes no step twice: after a kill some are done again
        self.run.define_metric("*", step_metric="step")

    def log(self, entry):
        self.run.log(entry)

    def finish(self, status):
        self.run.finish(status)


class Trackio(Tracker):
    """Its runs have no id to choose, so that one's name holds it. `step` is a word of its own."""

    name = "trackio"

    @staticmethod
    def package():
        import trackio

        return trackio

    def start(self, about):
        self.run = self.module.init(
            project="nanoswitch", name=f"{self.folder.resolve().name}-{self.identity()[:6]}",
            config=about, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, entry):
        self.run.log(entry, step=entry.pop("step", None))

    def finish(self, status):
        self.run.finish()


TRACKERS = {tracker.name: tracker for tracker in (Wandb, Trackio)}
