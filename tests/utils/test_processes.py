"""Loggers and process helpers; the names that dllm.utils exports."""

import logging
import sys

import pytest

import dllm.utils
from dllm.utils import get_default_logger, is_main_process, local_rank, main_process_first, rank, world_size
from dllm.utils.logging import _Console


@pytest.fixture
def fresh_logger():
    """A top-level logger that only this test uses."""
    name = "dllm_test_logger"
    logger = logging.getLogger(name)
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    yield name
    logger.handlers.clear()


def test_one_handler_however_often_asked(fresh_logger):
    for child in ("", ".a", ".a.b", ".a"):
        get_default_logger(fresh_logger + child)
    assert len(logging.getLogger(fresh_logger).handlers) == 1
    assert not logging.getLogger(fresh_logger + ".a").handlers


def test_main_process_informs_others_only_warn(fresh_logger, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    logger = get_default_logger(fresh_logger + ".x")
    assert not logger.isEnabledFor(logging.INFO) and logger.isEnabledFor(logging.WARNING)
    logging.getLogger(fresh_logger).setLevel(logging.NOTSET)
    monkeypatch.setenv("RANK", "0")
    assert get_default_logger(fresh_logger + ".x").isEnabledFor(logging.INFO)


def test_level_set_before_stays(fresh_logger):
    logging.getLogger(fresh_logger).setLevel(logging.ERROR)
    assert not get_default_logger(fresh_logger).isEnabledFor(logging.WARNING)


def test_console_is_silent_once_the_program_has_handlers(capsys, monkeypatch):
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "hello", None, None)
    _Console().emit(record)  # pytest has put handlers on the root logger
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    _Console().emit(record)
    assert capsys.readouterr().err == "hello\n"


def test_process_helpers_read_the_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), local_rank(), world_size(), is_main_process()) == (0, 0, 1, True)
    with main_process_first():
        pass
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert (rank(), local_rank(), world_size(), is_main_process()) == (3, 1, 4, False)
    with pytest.raises(RuntimeError, match="build the TrainingArguments before it"), main_process_first():
        pass


@pytest.fixture
def barriers(monkeypatch):
    """Events of one process of two; `as_rank(r)` says which."""
    events = []
    monkeypatch.setattr(dllm.utils.distributed, "_initialized", lambda: True)
    monkeypatch.setattr(dllm.utils.distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dllm.utils.distributed.dist, "barrier", lambda: events.append("barrier"))

    def as_rank(number):
        monkeypatch.setattr(dllm.utils.distributed.dist, "get_rank", lambda: number)
        return events

    return as_rank


@pytest.mark.parametrize(("number", "order"), [(0, ["work", "barrier"]), (1, ["barrier", "work"])])
def test_main_process_goes_first(barriers, number, order):
    events = barriers(number)
    with main_process_first():
        events.append("work")
    assert events == order


def test_a_failing_main_process_frees_the_others(barriers):
    events = barriers(0)
    with pytest.raises(KeyError), main_process_first():
        raise KeyError
    assert events == ["barrier"]


def test_every_exported_name_is_there():
    for module in (dllm.utils, sys.modules["dllm.data"]):
        for name in module.__all__:
            assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dllm.utils.nothing  # noqa: B018
