"""torch.compile for the trainer: tried on the model itself before the run counts on it."""

import numpy as np
import torch

from model import learns_bias
from nanoswitch.kernels import chooses_flex

# Inductor's. Left on, it keeps loops apart where one is over (B, T, C) and the other over (B T, C),
# and so the cast of a gradient is a kernel of its own, which reads all of it again
CUDA_OPTIONS = {"loop_ordering_after_fusion": False}


def compile_model(model, device, **flags):
    """model under torch.compile for tensors on a device; flags: torch.compile's."""
    options = CUDA_OPTIONS if device.type == "cuda" else None
    # a smaller micro-batch later is compiled anew: with a symbol for its size, all is slower
    return torch.compile(model, dynamic=False, options=options, **flags)


def compiled(trainer):
    """What trains: the model under torch.compile, which shares its weights, where the run asks for
    that and all ranks can; else the model as it is, and one line says why."""
    config, device = trainer.config, trainer.device
    wanted = config.compile == "true" or (config.compile == "auto" and device.type == "cuda")
    if not wanted:
        return trainer.model
    if device.type == "mps":
        print("torch.compile is not used on mps: training without it")
        return trainer.model
    # FlexAttention is the hardest part to compile
    flexes = device.type == "cuda" and flex_layers(trainer.model)
    for what in ("FlexAttention", "it") if flexes else ("it",):
        forward = compile_model(trainer.model, device)
        problem = failure(trainer, forward)
        if not trainer.ranks.sum(bool(problem))[0]:
            return forward
        if problem:
            print(f"torch.compile does not work here ({problem}): training without {what}")
        for block in trainer.model.transformer.h:
            block.attn.may_flex = False
    return trainer.model


def flex_layers(model):
    """Whether a layer takes FlexAttention on a card where it may choose."""
    config, encodings = model.config, model.encodings
    return any(
        chooses_flex(
            block.attn,
            masked=0 < block.attn.window < config.block_size or config.document_mask,
            learned=learns_bias(encodings[pos]),
        )
        for block, pos in zip(model.transformer.h, model.encoded_by, strict=True)
    )


def failure(trainer, forward):
    """What goes wrong in a forward and backward pass over a micro-batch and in one for validation,
    in a few words; "" if nothing does. They leave nothing behind but the compiled code."""
    numbers = np.arange(trainer.micro_batch) % trainer.train.count
    try:
        x, y = trainer.load(trainer.train, numbers)
        with trainer.autocast():
            _, loss = forward(x, y)
        loss.backward()
        with trainer.evaluation():
            forward(x, y)
    except torch.OutOfMemoryError:  # a step that runs out takes a smaller micro-batch
        return ""
    except Exception as error:  # whatever the compiler raises, training works without it
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    finally:
        trainer.model.train()
        trainer.model.zero_grad()
    return ""
