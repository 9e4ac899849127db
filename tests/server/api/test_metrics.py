"""/metrics: HTTP requests by endpoint, and the engine's own figures."""

from __future__ import annotations

import httpx


def test_http_requests_are_counted_by_endpoint_and_status_and_probes_are_not(http: httpx.Client) -> None:
    for path in ("/v1/models", "/v1/files/file-0", "/v1/nowhere", "/health"):
        http.get(path)
    lines = http.get("/metrics").text.splitlines()
    counted = [line for line in lines if line.startswith("http_requests_total")]
    for labels in (
        'handler="/v1/models",method="GET",status="2xx"',
        'handler="/v1/files/{file_id}",method="GET",status="4xx"',
        'handler="none",method="GET",status="4xx"',
    ):
        assert any(labels in line for line in counted), labels
    assert not any(f'handler="{probe}"' in line for line in lines for probe in ("/health", "/ready", "/metrics"))
    assert any(line.startswith("reftserve_engine_steps_total") for line in lines)
