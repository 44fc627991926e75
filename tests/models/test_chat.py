"""Chat templates: OpenAI messages in, the model's prompt out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvarn.errors import ModelError, RequestError
from kvarn.models.chat import ChatTemplate

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]


@pytest.fixture(scope="module")
def smollm2(model_folder: Path) -> ChatTemplate:
    return ChatTemplate.load(model_folder)


def test_the_bundled_model_s_template_gives_what_transformers_gives(smollm2: ChatTemplate, model_folder: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(model_folder)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "?"},
    ]
    for generate in (True, False):
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        assert smollm2.render(messages, add_generation_prompt=generate) == expected


def test_text_parts_become_one_text(smollm2: ChatTemplate) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert smollm2.render([{"role": "user", "content": parts}]) == smollm2.render(
        [{"role": "user", "content": "one two"}]
    )


def test_other_parts_are_refused_with_their_place(smollm2: ChatTemplate) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    with pytest.raises(RequestError, match="image_url") as caught:
        smollm2.render([{"role": "user", "content": "x"}, {"role": "user", "content": [image]}])
    assert caught.value.field == "messages[1].content"


def test_a_template_without_tools_gets_them_as_text(smollm2: ChatTemplate) -> None:
    assert not smollm2.knows_tools
    prompt = smollm2.render(CONVERSATION, tools=[WEATHER])
    system = prompt.split("<|im_end|>")[0]
    assert system.startswith("<|im_start|>system\nBe brief.") and '"name": "weather"' in system
    assert '<tool_call>[{"name": "weather", "arguments": {"city": "Oslo"}}]</tool_call>' in prompt
    assert "<tool_response>\nrain\n</tool_response>" in prompt


def test_results_of_several_calls_are_one_turn(smollm2: ChatTemplate) -> None:
    prompt = smollm2.render([*CONVERSATION, {"role": "tool", "tool_call_id": "c2", "content": "sun"}], tools=[WEATHER])
    assert prompt.count("<|im_start|>user") == 2


@pytest.mark.parametrize("depth", [400, 100_000])
def test_arguments_nested_without_end_are_served_or_refused(smollm2: ChatTemplate, depth: int) -> None:
    function = {"name": "f", "arguments": "[" * depth + "]" * depth}
    call = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    assert "[" * depth in smollm2.render([{"role": "user", "content": "x"}, call])


def test_a_template_with_tools_gets_them_whole_and_arguments_as_objects() -> None:
    template = ChatTemplate(
        {
            "default": "{% for m in messages %}{{ m.role }}{% for c in m.tool_calls or [] %}"
            "{{ c.function.arguments.city }}{% endfor %};{% endfor %}{{ tools | tojson }}"
        }
    )
    assert template.render(CONVERSATION, tools=[WEATHER]) == f"system;user;assistantOslo;tool;{json.dumps([WEATHER])}"
    assert template.render(CONVERSATION) == "system;user;assistantOslo;tool;null"


def test_requests_with_tools_take_the_template_made_for_them(tmp_path: Path) -> None:
    templates = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with {{ tools | length }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    template = ChatTemplate.load(tmp_path)
    assert template.render([]) == "plain"
    assert template.render([], tools=[WEATHER]) == "with 1"


def test_jinja_files_win_and_special_tokens_are_known(tmp_path: Path) -> None:
    config = {"chat_template": "old", "bos_token": {"content": "<s>"}, "eos_token": "</s>", "model_max_length": 3}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    assert ChatTemplate.load(tmp_path).render([{"role": "user", "content": "hi"}]) == "<s>hi</s>"


def test_what_templates_use_beyond_plain_jinja() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%%') }}{{ extra }}"
    )
    messages = [{"role": "user", "content": "<é>"}, {"role": "user", "content": "no"}]
    assert ChatTemplate({"default": source}).render(messages, extra="!") == '"<é>"%!'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ messages + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_what_a_template_refuses_is_a_request_error(source: str) -> None:
    with pytest.raises(RequestError, match="chat template") as caught:
        ChatTemplate({"default": source}).render([{"role": "user", "content": "x"}])
    assert caught.value.field == "messages"


def test_a_model_without_a_template_says_what_to_use() -> None:
    with pytest.raises(RequestError, match="/v1/completions"):
        ChatTemplate({}).render([{"role": "user", "content": "x"}])


def test_a_broken_template_is_the_model_s_fault() -> None:
    with pytest.raises(ModelError, match="not valid Jinja"):
        ChatTemplate({"default": "{% for %}"})
