"""Fixtures of the whole suite. No test touches the network; what a machine lacks is skipped with its reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("LILLIPUT_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run by hand with `make test-slow`"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of extra real data (benchmark files, stories260K); LILLIPUT_TEST_DATA names it."""
    folder = os.environ.get("LILLIPUT_TEST_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs the extra data folder: set LILLIPUT_TEST_DATA to it")
    return Path(folder)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model, where `lilliput pull smollm2-135m` has put it in the cache."""
    from lilliput.base.errors import UserError
    from lilliput.models import hub

    try:
        return hub.locate("smollm2-135m")
    except UserError as error:
        pytest.skip(f"needs the default model in the cache: run `lilliput pull smollm2-135m` ({error.what})")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that is present; tests that take it run once on each."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param
