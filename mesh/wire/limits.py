"""Every bound of the data plane, with its default. A violation closes that connection, no other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one listener or one set of connections. Bytes, counts, seconds as named."""

    max_message_bytes: int = 16 * 1024 * 1024
    max_concurrent_streams: int = 100
    max_header_list_bytes: int = 16 * 1024
    max_header_fields: int = 100
    max_header_value_bytes: int = 8 * 1024
    max_continuation_frames: int = 8
    hpack_table_bytes: int = 4_096
    max_frame_bytes: int = 16 * 1024
    # What a peer may have under way on a stream that nobody has accepted, or that nobody reads.
    stream_window_bytes: int = 64 * 1024
    # The same once its bytes flow; a connection's streams share the bound on what that adds.
    wide_window_bytes: int = 512 * 1024
    max_wide_bytes_per_connection: int = 4 * 1024 * 1024
    connection_window_bytes: int = 4 * 1024 * 1024
    accepted_window_bytes: int = 1024 * 1024  # a stream's window once its model is accepted
    resets_per_10s: int = 200
    settings_per_10s: int = 10
    pings_per_10s: int = 20
    control_frames_per_10s: int = 50_000  # PRIORITY, WINDOW_UPDATE and unknown types
    empty_data_frames_per_stream: int = 100
    max_control_output_bytes: int = 64 * 1024
    max_buffered_bytes_per_connection: int = 8 * 1024 * 1024
    max_buffered_bytes_total: int = 256 * 1024 * 1024
    preface_timeout_s: float = 5.0
    tls_timeout_s: float = 5.0
    headers_timeout_s: float = 10.0
    prefix_timeout_s: float = 10.0
    progress_timeout_s: float = 60.0
    idle_timeout_s: float = 3_600.0
    max_connections: int = 10_000


PUBLIC = Limits()
INSIDE = Limits(
    # A request with the longest header list that a router takes, and what the router adds to it.
    max_header_list_bytes=32 * 1024,
    max_header_fields=120,
    max_header_value_bytes=16 * 1024,
    max_wide_bytes_per_connection=1024 * 1024 * 1024,
    max_frame_bytes=256 * 1024,
    max_concurrent_streams=1_024,
    connection_window_bytes=16 * 1024 * 1024,
    resets_per_10s=100_000,
    settings_per_10s=1_000,
    pings_per_10s=1_000,
    control_frames_per_10s=10_000_000,
)
