"""SOAP (Vyas et al. 2024, arXiv 2409.11321), Adam in the eigenbasis of Shampoo's preconditioner:
the class of the package pytorch-optimizer, as one that a run can stop and go on with.

The paper's betas are 0.95. It keeps 2 m n + 2 m^2 + 2 n^2 numbers for an (m, n) matrix, and every
tenth step takes a QR decomposition of both sides: fast on a GPU, minutes on a CPU at GPT-2's size.
"""

PACKAGE = "pytorch-optimizer==4.1.0"


def soap_class():
    """ModuleNotFoundError with the command that helps, where the package is missing."""
    try:
        from pytorch_optimizer import SOAP
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"optimizer soap needs: pip install {PACKAGE}") from None

    class Resumable(SOAP):
        waits = True  # for the host to know whether a step is skipped: its state holds lists

        def step(self, closure=None):
            """The count of steps is in the state, which a checkpoint keeps, not in the groups."""
            for group in self.param_groups:
                counts = [self.state[p].get("step", 0) for p in group["params"] if p in self.state]
                group["step"] = max(counts, default=0)
            super().step(closure)
            for group in self.param_groups:
                for p in filter(self.state.__contains__, group["params"]):
                    self.state[p]["step"] = group["step"]

    return Resumable
