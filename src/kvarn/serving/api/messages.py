"""What the API process and the engine process say to each other: msgspec structs over two ZeroMQ sockets.

Token ids cross, text does not: tokenising, chat templates, detokenising, stop strings and tool calls are the
API process's work, so the engine process does nothing but schedule and compute.
"""

from __future__ import annotations

import msgspec

from kvarn.serving.agents.events import AgentEvent, CallReport
from kvarn.serving.agents.hints import UNKNOWN, AgentHints
from kvarn.serving.batch import TokenLogprobs
from kvarn.serving.reader import DEFAULT_RATE
from kvarn.serving.rounds.hints import ReuseMode, RoundHint, Segment
from kvarn.serving.rounds_report import RoundFacts, RoundReport
from kvarn.serving.sampling.params import SamplingParams

# ---- API -> engine ---------------------------------------------------------------------------------------


class Submit(msgspec.Struct, tag="submit", array_like=True):
    id: str
    prompt: list[int]
    params: SamplingParams
    tenant: str = ""
    priority: int = 0
    timeout: float = float("inf")
    """Seconds from arrival after which the engine gives the request up."""
    stream_rate: float = DEFAULT_RATE
    """Tokens a second that its reader takes."""
    agent: AgentHints | None = None
    continues: str = ""
    """The request whose tool call this one answers."""
    may_call: bool = False
    """It may end with a tool call: worth remembering after its end."""
    retain_seconds: float = UNKNOWN
    """How long its client wants its KV kept after its end; 0: not at all."""
    segments: tuple[Segment, ...] = ()
    """The parts of its prompt, which they cover; empty where its client says none."""
    round: RoundHint | None = None


class Cancel(msgspec.Struct, tag="cancel", array_like=True):
    id: str


class Acknowledge(msgspec.Struct, tag="acknowledge", array_like=True):
    """The reader of a request has read this many of its tokens; `fastest` is the rate he may be believed."""

    id: str
    tokens: int
    fastest: float


class Watch(msgspec.Struct, tag="watch", array_like=True):
    """What is there? Answered by one StreamsReport, between two steps; answers come in the order of the questions."""

    limit: int
    """Streams to tell of at most."""


class WatchAgents(msgspec.Struct, tag="watch_agents", array_like=True):
    """What do agents do? Answered by one AgentsReport, in order with the answers to Watch."""

    limit: int
    """Programs to tell of at most."""


class WatchRounds(msgspec.Struct, tag="watch_rounds", array_like=True):
    """What of rounds? Answered by one RoundsReport, in order with the answers to Watch."""

    limit: int
    """Rounds to tell of at most."""


class Tell(msgspec.Struct, tag="tell", array_like=True):
    """News of a tool call, or a question where it stands: answered by one Told with the same number."""

    number: int
    """0: nobody waits for the answer, so there is none."""
    event: AgentEvent


class Shutdown(msgspec.Struct, tag="shutdown", array_like=True):
    """Stop at once. (Draining is the API's work: it stops admitting and waits.)"""


ToEngine = Submit | Cancel | Acknowledge | Watch | WatchAgents | WatchRounds | Tell | Shutdown

# ---- engine -> API ---------------------------------------------------------------------------------------


class Loading(msgspec.Struct, tag="loading", array_like=True):
    """Progress of start-up, for people who wait."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, tag="ready", array_like=True):
    """The engine serves from now on."""

    max_context: int
    vocab_size: int
    num_blocks: int
    block_size: int
    device: str
    precision: str
    """Of the weights."""
    kv_dtype: str
    """Of cached keys and values."""
    load_seconds: float
    reuse: ReuseMode = "exact"
    """Of shared segments."""


class TokenOutput(msgspec.Struct, array_like=True):
    """News of one request after one step."""

    id: str
    tokens: list[int]
    finish_reason: str | None = None
    """A FinishReason value when this is the last news of the request."""
    logprobs: list[TokenLogprobs] | None = None
    """Beside `tokens` when asked for."""
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache; valid with the first token."""
    reused_tokens: int = 0
    """Prompt tokens whose KV is that of shared segments; valid with the first token."""
    error: str | None = None
    error_field: str | None = None
    """With finish_reason "error": what to tell the client; error_field set means the input was at fault."""
    error_status: int = 400
    """Of HTTP, where the input was at fault."""


class AgentStats(msgspec.Struct, array_like=True):
    """Agents and their tool calls. Counters are since start."""

    programs: int = 0
    calls: dict[str, int] = {}
    """CallState value -> tool calls that are not over."""
    held_blocks: int = 0
    """Device blocks held for them, each conversation's counted by itself."""
    reserved_blocks: int = 0
    """Those of them that wait for content."""
    started: int = 0
    finished: int = 0
    expired: int = 0
    continued: int = 0
    offloads: int = 0
    """Conversations copied to the host and taken off the device while their tools ran."""
    on_time_uploads: int = 0
    """Next requests that found their conversation brought back."""
    late_uploads: int = 0
    """Those that came while it was still on the host, or on its way."""
    wasted_uploads: int = 0
    """Conversations brought back and given up again before a request came."""
    forecasts: int = 0
    """Calls whose duration is known."""
    forecast_error_seconds: float = 0.0
    """Sum of the differences between what they took and what was forecast."""
    inversions: int = 0
    """Critical requests that waited for blocks of minor ones."""


class EngineStats(msgspec.Struct, array_like=True):
    """Where the engine stands; sent with outputs, at most a few times a second. Counters are since start."""

    waiting: int = 0
    running: int = 0
    blocks_free: int = 0
    blocks_active: int = 0
    blocks_cached: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix index."""
    prefix_hits: int = 0
    """Prompt tokens found there."""
    prompt_tokens: int = 0
    """Prompt tokens computed."""
    output_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
    drafted_tokens: int = 0
    """Guesses at tokens to come that were computed (kvarn.serving.speculation)."""
    accepted_tokens: int = 0
    """Those that came true."""
    loads: int = 0
    """Requests whose KV was brought back from the host."""
    host_blocks: int = 0
    host_blocks_used: int = 0
    to_host_bytes: int = 0
    from_host_bytes: int = 0
    failed_copies: int = 0
    disk_blocks: int = 0
    disk_blocks_used: int = 0
    to_disk_bytes: int = 0
    from_disk_bytes: int = 0
    bad_disk_blocks: int = 0
    to_host_rate: float = 0.0
    """Bytes a second that copies to the host have lately made; 0 before the first. As the three below."""
    from_host_rate: float = 0.0
    to_disk_rate: float = 0.0
    from_disk_rate: float = 0.0
    loading: int = 0
    """Requests whose KV is on its way back to the device."""
    agents: AgentStats | None = None
    """None where the policy knows no agents."""
    rounds: RoundFacts | None = None
    """None where nothing collects rounds."""


class StepOutputs(msgspec.Struct, tag="outputs", array_like=True):
    outputs: list[TokenOutput]
    stats: EngineStats | None = None


class StreamReport(msgspec.Struct, array_like=True):
    """One request as it stands. Times in seconds."""

    id: str
    state: str
    """A RequestState value."""
    paused: bool
    """Runs, and had no part in the last step: its reader has enough, or the step was full."""
    age: float
    prompt_tokens: int
    output_tokens: int
    max_output_tokens: int
    rate: float
    """Tokens a second that its reader takes."""
    unread_tokens: int
    slack: float
    """Until the reader waits; 0 while he does."""
    stalls: int
    stall_seconds: float
    preemptions: int
    blocks: int
    """Blocks of KV that all its tokens fill; each number below counts leading ones of them."""
    device_blocks: int
    host_blocks: int
    disk_blocks: int


class StreamsReport(msgspec.Struct, tag="streams", array_like=True):
    """All that the engine has; its most urgent requests one by one."""

    stats: EngineStats
    paused: int
    """Requests that run and had no part in the last step."""
    streams: list[StreamReport]
    """Who has waited longest for a token comes first; then who will run dry soonest."""
    host_idle: int = 0
    """Blocks on the host that nobody needs now."""
    block_bytes: int = 0
    """Of KV in a block; 0 where nothing is ever copied."""


class NodeReport(msgspec.Struct, array_like=True):
    """One model call of a program, and the tool call that it ended with."""

    name: str
    request: str
    hints: AgentHints
    state: str
    """A RequestState value; or "calling" while its tool runs, "answered" until the next request has the result,
    "retained" while it is kept as its client asked, "ended"."""
    tool: str = ""
    call: CallReport | None = None
    blocks: int = 0
    """Blocks of KV that its tokens fill; each number below counts leading ones of them."""
    device_blocks: int = 0
    host_blocks: int = 0
    disk_blocks: int = 0
    reserved_blocks: int = 0
    """Device blocks taken for its return, without content."""
    age: float = UNKNOWN
    """Seconds since it came; UNKNOWN where that is forgotten."""
    tokens: int = 0
    """Of its conversation, while the engine holds it."""


class ProgramReport(msgspec.Struct, array_like=True):
    """One run of an application. Times in seconds, UNKNOWN where nobody knows."""

    id: str
    age: float
    idle: float
    """Since something of it last came or ended."""
    work_tokens: float
    """What it has had computed, in tokens of output."""
    remaining_seconds: float
    total_seconds: float
    nodes: list[NodeReport]


class AgentsReport(msgspec.Struct, tag="agents", array_like=True):
    """Programs that were seen last, and what all device blocks are held for."""

    stats: EngineStats
    blocks: dict[str, int]
    """See kvarn.serving.block_states; empty where the policy knows no agents."""
    programs: list[ProgramReport]


class RoundsReport(msgspec.Struct, tag="rounds", array_like=True):
    """The last rounds, the newest first."""

    stats: EngineStats
    rounds: list[RoundReport]


class Told(msgspec.Struct, tag="told", array_like=True):
    """What became of a Tell: a report, or why it was refused."""

    number: int
    report: CallReport | None = None
    error: str = ""
    field: str | None = None
    """Of the event, where one is at fault."""
    status: int = 200
    """Of HTTP."""


class StartFailed(msgspec.Struct, tag="start_failed", array_like=True):
    """The engine cannot start (model, memory): the message says what to do; nothing follows."""

    message: str


FromEngine = Loading | Ready | StepOutputs | StreamsReport | AgentsReport | RoundsReport | Told | StartFailed
