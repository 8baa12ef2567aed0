"""No test reaches the network, the study of every config among them (conftest.py); this shows that it would tell."""

from __future__ import annotations

import socket

import pytest
from huggingface_hub import constants

from fluxsae.models.load import load_pipeline
from tests.conftest import called


def test_an_attempt_is_stopped_and_noted() -> None:
    with socket.socket() as client, pytest.raises(OSError, match="may not reach"):
        client.connect(("192.0.2.1", 80))
    with pytest.raises(OSError, match="may not reach"):
        socket.getaddrinfo("example.org", 443)
    assert [attempt.split()[0] for attempt in called] == ["socket.connect", "socket.getaddrinfo"]
    called.clear()
    with socket.socket() as server, socket.socket() as client:  # this machine may be reached
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())


@pytest.mark.skipif(constants.HF_HUB_OFFLINE, reason="the hub is switched off by HF_HUB_OFFLINE")
def test_only_a_hub_name_makes_a_call() -> None:
    with pytest.raises(OSError):
        load_pipeline("someone/some-model")
    assert called
    called.clear()
