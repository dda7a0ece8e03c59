"""A cache in an S3 bucket (moto's server on loopback): rows and batches equal the local cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from disk_cache import disk_cache

from imkd_data import open_cache
from imkd_data.cache.remote import open_remote


def test_a_bucket_reads_like_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = pytest.importorskip("moto.server", reason="needs moto[server]")
    s3fs = pytest.importorskip("s3fs", reason="needs imkd[remote]")
    for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", f"http://{host}:{port}")
        root = disk_cache(tmp_path)
        s3 = s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}", skip_instance_cache=True)
        s3.mkdir("bucket")
        s3.put(str(root), "bucket/cache", recursive=True)
        near, far = open_cache(root), open_remote("s3://bucket/cache", store=tmp_path / "store")
        assert far.id == near.id
        for row in near.rows():
            assert np.array_equal(near.read("boxes", row), far.read("boxes", row))
            assert near.read("images", row) == far.read("images", row)
    finally:
        running.stop()
