"""What does not fit into memory, where a run can go on without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

logger: Any = get_logger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: of the accelerator, of cuDNN or of the CPU."""
    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


@contextmanager
def unless_it_does_not_fit(what: str) -> Iterator[None]:
    """Inside, running out of memory is a warning, and the rest of the block is skipped."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("%s does not fit into memory and is skipped: %s", what, str(error).partition("\n")[0])
    else:
        return
    clear_device_cache(garbage_collection=True)  # here the traceback, and the tensors that it held, are gone
