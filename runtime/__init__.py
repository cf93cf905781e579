"""What carries a run: flags, stages, files, checkpoints, ranks, memory. It knows no loss: one can read without it."""

from runtime import ranks, steps  # noqa: F401
from runtime.files import replacing, write_json  # noqa: F401
from runtime.flags import cli, launch, require  # noqa: F401
from runtime.stage import Progress, Stage, peak_memory_mb, shown, stage  # noqa: F401
from runtime.steps import (  # noqa: F401
    default_device,
    inference_dtype,
    lr_at,
    mixed_precision,
    seed_of,
    set_lr,
    set_threads,
    trained_dtype,
)
