"""One exported model and one server, shared by all tests of serving that only send requests."""

import pytest

from tests.support.server import Server, export_model


@pytest.fixture(scope="session")
def folder_of_chat_model(tmp_path_factory):
    return export_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def server(folder_of_chat_model):
    with Server(folder_of_chat_model, "--max-new-tokens", "2000", "--max-waiting", "8") as running:
        yield running
