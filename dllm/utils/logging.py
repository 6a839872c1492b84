"""Loggers that know which process they are in and never print a line twice."""

import logging
import sys

from tqdm.auto import tqdm

from dllm.utils.distributed import is_main_process


class _Console(logging.Handler):
    """Writes to stderr beside progress bars; stays silent once the program has set up logging itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return  # the root logger's handlers get the record too: it would appear twice
        tqdm.write(self.format(record), file=sys.stderr)


def get_default_logger(name: str) -> logging.Logger:
    """The logger of that name: INFO and above on the main process, WARNING and above on the others.

    The level and the console handler sit on the top package of `name` (`dllm` for `dllm.data.sft`), once,
    however often this is called; a level that was set before stays.
    """
    top = logging.getLogger(name.partition(".")[0])
    if not any(isinstance(handler, _Console) for handler in top.handlers):
        console = _Console()
        console.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        top.addHandler(console)
    if top.level == logging.NOTSET:
        top.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    return logging.getLogger(name)
