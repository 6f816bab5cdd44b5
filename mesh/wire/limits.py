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
    max_waiting_for_connection: int = 8_192  # calls, for one to the same peer


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a peer may be quiet before it is asked, and before it counts as silent."""

    # A connection with calls on it that brought nothing for so long is asked by a PING ...
    ping_after_s: float = 0.25
    # ... and is silent when it brings nothing in this time after that.
    ping_timeout_s: float = 0.75
    # A connection without calls is asked this often: 5 PINGs in 10 s, far below any bound on them.
    idle_ping_s: float = 2.0
    # After so much silence another connection is made: the way may be broken and not the peer (a
    # router that forgot the flow drops everything without a word).
    second_way_s: float = 2.0
    # A silent connection is kept so long: its peer may be stopped for a moment, and answer then.
    silent_close_s: float = 30.0
    # When the watch itself comes so late, this process was held up: nobody is blamed for that time.
    late_s: float = 0.5

    @property
    def connect_s(self) -> float:
        """What waits for a connection waits at most so long for this one."""
        return self.ping_after_s + self.ping_timeout_s


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
