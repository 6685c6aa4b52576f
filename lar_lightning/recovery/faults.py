"""What is said of failures that no setting names: memory, other processes, disks."""

from lar_lightning.artefacts import disk_error

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "nccl communicator was aborted",
    "remote process exited",
    "failed to recv, got 0 bytes",
    "connection was likely closed",
)
"""As gloo, NCCL and the store of torch.distributed word it."""


def explained(error: BaseException) -> str | None:
    """Return one sentence or two on a failure of the machine, or None for any other error."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(part in text for part in OUT_OF_MEMORY):
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"a step must fit in memory, got: {first}. Lower `data.init_args.loading.batch_size`, "
            "`data.init_args.loading.max_tokens` or `model.rows_per_chunk`, train less "
            "(`model.trainable`), or shard over more devices; `python -m lar_lightning estimate` "
            "says what fits. The last checkpoint is kept, and the same command goes on from it."
        )
    if isinstance(error, RuntimeError) and any(part in text for part in LOST_PEER):
        return (
            "all processes of a run must stay alive, got one that ended: "
            f"{str(error).splitlines()[0][:200]}. What it printed before says why. The last "
            "checkpoint is kept; the same command goes on from it."
        )
    reason = disk_error(error)
    if reason is None:
        return None
    name = getattr(error, "filename", None)
    return (
        "`run_dir` must be a place with room that can be read and written, got: "
        f"{reason}{f' ({name})' if name else ''}. Free space, give rights or choose another "
        "`run_dir`; what was finished before is kept."
    )
