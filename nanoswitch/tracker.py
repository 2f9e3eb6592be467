"""Weights & Biases, beside the log."""

import contextlib
import os
import secrets

from nanoswitch.files import write_beside

PIP = "pip install wandb"


class Tracker:
    """Sends what the log gets to Weights & Biases too, as one run there however often this one is
    continued. Whatever fails in it costs a warning, and training goes on without.

    ModuleNotFoundError, before anything is done, when the package is missing."""

    def __init__(self, folder, say):
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"--wandb true needs wandb: {PIP} ({error})") from None
        self.wandb, self.folder, self.say, self.run = wandb, folder, say, None

    def attempt(self, call, *args):
        if not self.wandb:
            return
        try:
            call(*args)
        except Exception as error:  # of any kind: it talks to another process, and to a server
            if isinstance(error, ConnectionError):  # its process died: it shall not wait for it
                with contextlib.suppress(Exception, SystemExit):
                    self.wandb.teardown()
            self.wandb, reason = None, (str(error).splitlines() or [""])[0]
            key = os.environ.get("WANDB_API_KEY") or None
            reason = f"{type(error).__name__}: {reason.replace(key, '***') if key else reason}"
            self.say(f"warning: wandb failed ({reason}); training goes on without it")

    def start(self, entry):
        name = self.folder / "wandb_id"
        if not name.is_file():
            with write_beside(str(name)) as file:
                file.write(secrets.token_hex(8).encode())
        # neither the terminal's lines nor git's remote, whose address may hold a password
        quiet = self.wandb.Settings(console="off", disable_git=True, save_code=False, quiet=True)
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", "nanoswitch"), name=self.folder.resolve().name,
            id=name.read_text().strip(), resume="allow", dir=self.folder, settings=quiet,
        )  # fmt: skip
        about = {name: entry[name] for name in entry.keys() - {"config", "event", "step"}}
        self.run.config.update(entry["config"] | about, allow_val_change=True)
        # not wandb's own count, which takes no step twice: after a kill some are done again
        self.run.define_metric("*", step_metric="step")

    def write(self, entry):
        if "config" in entry:
            self.start(entry)
        else:
            if "samples" in entry:
                rows = [[entry["step"], text] for text in entry["samples"]]
                entry["samples"] = self.wandb.Table(["step", "text"], rows)
            self.run.log({name: value for name, value in entry.items() if value is not None})

    def finish(self, status):
        self.run.finish(status)
