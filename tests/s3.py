"""Buckets of a server of this process, as obstore finds them."""

import logging
import urllib.request
from unittest.mock import patch

import pytest

from ocelot_em.store.bucket import BucketObjects

boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")
backends = pytest.importorskip("moto.backends")

BUCKET = "ocelot-tests"


@pytest.fixture(scope="module")
def server():
    # The server logs every request.
    logger = logging.getLogger("werkzeug")
    level = logger.level
    logger.setLevel(logging.ERROR)
    moto = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    modules = [*backends.list_of_moto_modules()]
    # For each request it would list its own folder, which takes half of the time.
    with patch.object(backends, "list_of_moto_modules", lambda: modules):
        moto.start()
        host, port = moto.get_host_and_port()
        yield f"http://{host}:{port}"
        moto.stop()
    logger.setLevel(level)


@pytest.fixture
def bucket(server, monkeypatch):
    """A client of a new bucket; obstore finds the server by its environment."""
    environment = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # A process opens each place once, with the environment of that moment.
    BucketObjects.opened.cache_clear()
    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    yield client
    BucketObjects.opened.cache_clear()
    urllib.request.urlopen(f"{server}/moto-api/reset", data=b"").close()
