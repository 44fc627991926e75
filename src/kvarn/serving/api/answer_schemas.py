"""What the server answers, for /openapi.json. Answers are written by hand for speed: these models only describe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from kvarn.serving.rounds.hints import ReuseMode


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    cached_tokens: int
    reused_tokens: int = 0
    """Whose KV was that of shared segments; left out where there are none."""


class UsageBody(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


FinishReason = Literal["stop", "length", "tool_calls"]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class CalledFunction(BaseModel):
    name: str
    arguments: str


class AnsweredToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnsweredToolCall] = Field(default_factory=list)


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class HintOutcome(BaseModel):
    """What became of one hint."""

    hint: str
    outcome: Literal["accepted", "clipped", "ignored"]
    reason: str = ""


class HintOutcomes(BaseModel):
    protocol_version: Literal[1]
    message_id: str = ""
    outcomes: list[HintOutcome]


class Advised(BaseModel):
    """An answer that tells what became of the request's hints, where it had any."""

    kv_hints: HintOutcomes = Field(default_factory=lambda: HintOutcomes(protocol_version=1, outcomes=[]))


class ChatCompletion(Advised):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] = Field(default_factory=list)
    """With return_token_ids; in a stream those that are new."""


class Completion(Advised):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(Advised):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: dict[str, str] | None
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    """Tokens of prompt and output together; null while the engine starts."""


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Tokenized(BaseModel):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] = Field(default_factory=list)


class Detokenized(BaseModel):
    prompt: str


class KVPlaces(BaseModel):
    """In blocks of the KV cache, each count that of leading blocks: one block may be in several places."""

    needed: int
    """What all of the stream's tokens fill."""
    device: int
    host: int
    disk: int


class Stream(BaseModel):
    id: str
    state: Literal["waiting", "loading", "running"]
    paused: bool
    """Runs, and had no part in the engine's last step: its reader has enough, or the step was full."""
    age_seconds: float
    prompt_tokens: int
    output_tokens: int
    max_output_tokens: int
    rate: float
    """Tokens a second that the reader takes."""
    unread_tokens: int
    slack_seconds: float
    """Until the reader waits; 0 while he does."""
    stalls: int
    stall_seconds: float
    preemptions: int
    blocks: KVPlaces


class StreamCounts(BaseModel):
    total: int
    waiting: int
    loading: int
    running: int
    """With those that are paused."""
    paused: int


class TierBlocks(BaseModel):
    total: int
    used: int
    cached: int
    """Part of `used` that nobody needs now; kept for who comes with the same tokens. Not told of the disk."""


class TierTotals(BaseModel):
    device: TierBlocks
    host: TierBlocks
    disk: TierBlocks


class CopySpeeds(BaseModel):
    """Bytes per second of recent copies; null before the first one."""

    to_host: float | None
    from_host: float | None
    """Back to the device."""
    to_disk: float | None
    from_disk: float | None
    """To the host."""


class StreamList(BaseModel):
    """All requests of the engine in numbers, and the most urgent ones one by one."""

    object: Literal["list"]
    model: str
    data: list[Stream]
    """Who has waited longest for a token comes first; then who will run dry soonest."""
    streams: StreamCounts
    blocks: TierTotals
    block_tokens: int
    block_bytes: int
    """0 where blocks are never copied."""
    tokens_per_second: float
    copy_bytes_per_second: CopySpeeds


class CallFacts(BaseModel):
    """Where a tool call stands. Times in seconds; null where nobody knows."""

    state: str
    """Where its conversation's KV is: kept, offloading, offloaded, reserving, uploading, ready or released. Dead once
    it is over; announced before its request has ended; untracked where the policy knows no agents."""
    expected_seconds: float | None
    """Of the whole call."""
    remaining_seconds: float | None
    elapsed_seconds: float | None
    """Since it began, or what it took."""
    deadline_seconds: float | None
    """Until it is given up."""
    held_blocks: int
    """KV blocks kept on the device for it."""


class AgentCall(CallFacts):
    object: Literal["agent.call"]
    request: str
    closed: int
    """Calls that a close has ended."""


class NodePlaces(KVPlaces):
    reserved: int
    """Taken on the device for its return, without content."""


class AgentNode(BaseModel):
    """One model call of a program. What its client does not tell is empty, 0 or false."""

    name: str
    request: str
    agent: str
    after: list[str]
    join: str
    depth: int
    critical: bool
    importance: int
    state: Literal["waiting", "loading", "running", "calling", "answered", "retained", "ended"]
    """calling: its tool runs. answered: until a request has the tool's result. retained: kept as its client asked."""
    tool: str
    age_seconds: float | None
    """Since it came; null where that is forgotten."""
    tokens: int
    """Of its conversation, while the engine holds it."""
    call: CallFacts | None
    blocks: NodePlaces


class AgentProgram(BaseModel):
    """One run of an application."""

    id: str
    age_seconds: float
    idle_seconds: float
    work_tokens: float
    """What it has had computed, in tokens of output."""
    remaining_seconds: float | None
    total_seconds: float | None
    nodes: list[AgentNode]


class AgentTotals(BaseModel):
    """Of tool calls since the engine's start."""

    started: int
    finished: int
    expired: int
    """Given up."""
    continued: int
    """Gone on from by a request."""
    offloads: int
    """Conversations taken off the device while their tools ran."""
    on_time_uploads: int
    """Back on the device before the next request came."""
    late_uploads: int
    wasted_uploads: int
    """Back, and given up again."""
    forecasts: int
    """Calls that were forecast and are over."""
    forecast_error_seconds: float
    """How far off these forecasts were, added up."""
    inversions: int
    """Critical requests that waited, or left the device, while minor ones held the blocks that they lacked."""


class AgentList(BaseModel):
    """The programs that were seen last, those with something going on first."""

    object: Literal["list"]
    model: str
    data: list[AgentProgram]
    programs: int
    """That the engine remembers."""
    calls: dict[str, int]
    """Tool calls that go on, by where their conversations' KV is."""
    totals: AgentTotals
    blocks: dict[str, int]
    """The device's KV blocks by what they are held for; empty where the policy knows no agents."""
    num_blocks: int
    block_tokens: int


class Round(BaseModel):
    """One round, as it was when its wait was over."""

    id: str
    members: int
    """Requests that it was to have."""
    arrived: int
    waited_seconds: float
    mode: ReuseMode
    segments: int
    """Shared segments, each counted once."""
    reused_tokens: int
    """Prompt tokens whose KV was that of shared segments."""
    refreshed_tokens: int
    """Tokens of shared segments that were computed anew where they stand."""


class RoundTotals(BaseModel):
    """Of rounds and segments since the engine's start; what waits or is held, of now."""

    collected_rounds: int
    late_members: int
    """Requests that came after their round's wait was over."""
    waiting_members: int
    segment_hits: int
    """Segments of requests whose KV was there."""
    segment_misses: int
    encoded_tokens: int
    """Tokens of segments computed alone."""
    reused_tokens: int
    refreshed_tokens: int
    selection_passes: int
    segment_tokens_held: int
    segment_bytes: int
    mirror_bytes: int
    """KV kept of requests that ended, as it is stored."""
    dense_bytes: int
    """What the same would take in full."""
    resumed_requests: int
    """Requests that went on where one stopped that had ended."""
    resumed_tokens: int
    """Tokens with KV of their own that these need not compute."""


class RoundList(BaseModel):
    """The last rounds, the newest first."""

    object: Literal["list"]
    model: str
    data: list[Round]
    totals: RoundTotals


class Health(BaseModel):
    status: Literal["ok"]
