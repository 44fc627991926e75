"""What clients may send, field by field. Wrong types are refused; fields that are not named here are ignored.

Names and meanings are OpenAI's; those marked "extension" are the ones vLLM's clients send beside them. Lists are
checked up to their first wrong item (`fail_fast`): millions of wrong items must not cost millions of error messages.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from kvarn.serving.api.hint_schemas import Body, HintFields, Name
from kvarn.serving.api.hints import LONGEST_SECONDS, LONGEST_TEXT
from kvarn.serving.api.segments import MOST_SEGMENTS
from kvarn.serving.reader import FASTEST, SLOWEST
from kvarn.serving.rounds.hints import SegmentKind
from kvarn.serving.sampling.params import MAX_LOGIT_BIAS, MAX_LOGPROBS

MAX_N = 128
MAX_STOPS = 16
MAX_PROMPTS = 1024
MOST_STAGES = 64
_INT64 = 2**63 - 1
_INT32 = 2**31 - 1

Token = Annotated[int, Field(ge=0, le=_INT32)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
JsonObject = dict[str, Any]
StreamRate = Annotated[float, Field(ge=SLOWEST, le=FASTEST)]
STREAM_RATE = "extension; tokens per second that the reader takes (also: header X-Stream-Rate)"


class StreamOptions(Body):
    include_usage: bool | None = None


class SamplingFields(HintFields):
    """Fields that chat and plain completions share."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_N)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-_INT64 - 1, le=_INT64)
    logit_bias: Annotated[dict[TokenKey, float], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    user: str | None = None
    top_k: int | None = Field(None, ge=-1, le=_INT32, description="extension; 0 or -1 keeps every token")
    min_p: float | None = Field(None, ge=0, le=1, description="extension")
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description="extension")
    min_tokens: int | None = Field(None, ge=0, le=_INT32, description="extension; no end before this many tokens")
    ignore_eos: bool | None = Field(None, description="extension; generate up to max_tokens whatever comes")
    stop_token_ids: Annotated[list[Token], Field(max_length=1024, fail_fast=True)] | None = Field(
        None, description="extension"
    )
    include_stop_str_in_output: bool | None = Field(None, description="extension")
    skip_special_tokens: bool | None = Field(None, description="extension; default true")
    stream_rate: StreamRate | None = Field(None, description=STREAM_RATE)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


SEGMENT = "extension; a shared text is the same tokens wherever it stands, so its KV can be reused"


class Marks(Body):
    """What a text is to the agents that get it."""

    segment: SegmentKind | None = Field(None, description=SEGMENT)
    segment_id: Name | None = Field(None, description="extension; what the client calls a shared text")


class ContentPart(Marks):
    type: str
    text: str | None = None
    refusal: str | None = None


class Message(Marks):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None


FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class Function(Body):
    name: FunctionName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedToolChoice(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchemaFormat(Body):
    name: str | None = None
    description: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


ToolMode = Literal["none", "auto", "required"]


class ChatRequest(SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, le=_INT32)
    max_completion_tokens: int | None = Field(None, ge=1, le=_INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: ToolMode | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: JsonObject | None = Field(None, description="extension; variables for the chat template")


Prompt = (
    str
    | Annotated[list[Token], Field(min_length=1, fail_fast=True)]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[
        list[Annotated[list[Token], Field(min_length=1, fail_fast=True)]],
        Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
    ]
)


class SegmentBody(Body):
    kind: SegmentKind
    content: str | Annotated[list[Token], Field(fail_fast=True)] = Field(description="text or token ids")
    id: Name | None = Field(None, description="what the client calls it")


class CompletionRequest(SamplingFields):
    """With a prompt, or with the segments of one."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["prompt"]}, {"required": ["segments"]}]})

    prompt: Prompt | None = None
    segments: Annotated[list[SegmentBody], Field(max_length=MOST_SEGMENTS, fail_fast=True)] | None = Field(
        None, description="extension; in place of prompt: its parts, each made into tokens on its own"
    )
    max_tokens: int | None = Field(None, ge=1, le=_INT32)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_N)
    return_token_ids: bool | None = Field(None, description="extension; choices get token_ids, those of the answer")
    response_format: ResponseFormat | None = Field(None, description="extension")


class TokenizeRequest(Body):
    """Either a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[list[Token], Field(fail_fast=True)]


class ReadRequest(Body):
    """How far a stream's reader is."""

    tokens: int = Field(ge=0, le=_INT32, description="tokens of the answer read so far")
    index: int = Field(0, ge=0, le=MAX_N * MAX_PROMPTS, description="which of the request's answers")


ShortText = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT)]


class EventRequest(Body):
    """News of a tool call."""

    type: Literal["call_start", "call_progress", "call_finish", "close"]
    request: ShortText | None = Field(None, description="id of the answer that made the call, or of the tool call")
    tool: ShortText | None = None
    seconds: float | None = Field(
        None, ge=0, le=LONGEST_SECONDS, description="call_start: an estimate; call_finish: what it took"
    )
    stages: Annotated[list[ShortText], Field(max_length=MOST_STAGES, fail_fast=True)] | None = Field(
        None, description="call_start: names of its parts, in order"
    )
    stage: ShortText | None = Field(None, description="call_progress: the part that it has come to")
    fraction: float | None = Field(None, ge=0, le=1, description="call_progress: how much of it is done")
    program: ShortText | None = Field(None, description="close: ends all calls of a program")


# ---- /v1/responses ---------------------------------------------------------------------------------------


class InputItem(Body):
    """A message, a function call the model made, or the result of one."""

    type: Literal["message", "function_call", "function_call_output"] | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None


class ResponseTool(Body):
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class NamedResponseTool(Body):
    type: Literal["function"]
    name: str


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    format: TextFormat | None = None


class ResponsesRequest(HintFields):
    model: str | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=_INT32)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stream: bool | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponseTool], Field(fail_fast=True)] | None = None
    tool_choice: ToolMode | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    stream_rate: StreamRate | None = Field(None, description=STREAM_RATE)
    store: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


def messages_json(messages: list[Message] | None) -> list[JsonObject]:
    """Messages as chat templates read them, with the marks of shared texts."""
    return [message.model_dump(exclude_none=True) for message in messages or ()]


def answered_calls(messages: list[Message]) -> list[str]:
    """Ids of the tool calls whose results end a conversation, the last first."""
    results = takewhile(lambda message: message.role == "tool", reversed(messages))
    return [message.tool_call_id for message in results if message.tool_call_id]


def tools_json(tools: list[Tool] | None) -> list[JsonObject]:
    """Tools as chat templates read them."""
    return [tool.model_dump(exclude_none=True) for tool in tools or ()]
