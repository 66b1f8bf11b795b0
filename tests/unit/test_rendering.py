"""Chats through real chat templates and tokenizers: nothing is lost, added or raised without
a word.
"""

import json

import pytest
from tokenizers.processors import TemplateProcessing

from eopd.config import ConfigError, Part, PromptsConfig
from eopd.models.tiny import train_tokenizer
from eopd.prompts import PromptSet, TeacherView
from eopd.prompts.rendering import Rendering

ASK = {"role": "user", "content": "Weather in Bonn?"}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bonn"}}}
TURN = {"role": "assistant", "content": "", "reasoning_content": "I need it.", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "12 C", "name": "get_weather"}
TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]

SHOWS_ALL = (
    "{{ bos_token }}{% for t in tools or [] %}<tool>{{ t.function.name }}{% endfor %}{% for "
    "m in messages %}<{{ m.role }}>{% if m.reasoning_content %}<think>{{ "
    "m.reasoning_content }}{% endif %}{{ m.content }}{% for c in m.tool_calls or [] "
    "%}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% if "
    "m.name %}({{ m.name }}){% endif %}{% endfor %}{{ '' if thinking else '<no-think>' }}"
)


def tokenizer(template=None, adds="$A"):
    """A byte-level tokenizer that puts special tokens around plain text, as ``adds`` says."""
    made = train_tokenizer(["Weather in Bonn? a b c"], 270)
    special = [
        (word, made.convert_tokens_to_ids(word))
        for word in adds.split()
        if not word.startswith("$")
    ]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=adds, special_tokens=special)
    made.chat_template = template or made.chat_template

    return made


def rendered(chat, template=None, *, tools=(), adds="$A", kind="chat", **options):
    own = tokenizer(template, adds)
    made = Rendering(whose="student", tokenizer=own, template=kind, options=options)
    token_ids, notes = made.token_ids(chat, tools, "rows.jsonl:1")
    return own.decode(token_ids), notes


# --- chat templates


def test_tools_calls_and_thoughts_reach_the_template():
    text, notes = rendered([ASK, TURN, RESULT], SHOWS_ALL, tools=TOOLS, thinking=True)
    assert text == (
        "<|im_start|><tool>get_weather<user>Weather in Bonn?<assistant><think>I need it."
        '<call>get_weather{"city": "Bonn"}<tool>12 C(get_weather)'
    )
    assert notes == []
    assert rendered([ASK], SHOWS_ALL)[0].endswith("<no-think>")


@pytest.mark.parametrize(
    ("chat", "tools", "message"),
    [
        (
            [ASK, TURN, RESULT],
            (),
            "rows.jsonl:1: tool_calls: the student's chat template does not show them",
        ),
        ([ASK], TOOLS, "rows.jsonl:1: tools: the student's chat template does not show them"),
    ],
)
def test_a_template_that_drops_tools_is_refused(chat, tools, message):
    with pytest.raises(ConfigError, match=message):
        rendered(chat, tools=tools)


def test_a_template_that_asks_for_the_date_is_told_one_that_stays():
    template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    text, notes = rendered([{"role": "user", "content": "Weather?"}], template)
    assert text == "26 Jul 2024: Weather?"
    assert notes == [
        "the student's chat template asks for the date, and is always told 2024-07-26, so that "
        "prompts do not change from day to day"
    ]


def test_what_else_a_template_drops_is_noted():
    thought = {"role": "assistant", "content": "b", "reasoning_content": "hm", "weight": 1}
    _, notes = rendered([ASK, thought, ASK], enable_thinking=False)
    assert notes == [
        "the student's chat template does not show `reasoning_content` of the messages",
        "the student's chat template does not show `weight` of the messages",
        "the student's chat template does not know the template option enable_thinking",
    ]
    asks = "{% if enable_thinking %}{% endif %}{{ messages[0].content }}"
    _, notes = rendered([ASK], asks, thinking=False)
    assert notes == ["the student's chat template does not know the template option thinking"]
    assert rendered([ASK], asks, enable_thinking=False)[1] == []
    users_only = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    _, notes = rendered([{"role": "system", "content": "s"}, ASK], users_only)
    assert notes == ["the student's chat template does not show `system` messages as they stand"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('No system role') }}", "No system role"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ messages.nothing.more }}", "has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for %}", "Expected an expression|expected token"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth"),
    ],
)
def test_whatever_a_template_raises_is_one_message(template, message):
    with pytest.raises(
        ConfigError, match=rf"rows.jsonl:1: the student's chat template refuses it: .*({message})"
    ):
        rendered([ASK], template)


def test_whatever_a_tokenizer_raises_is_one_message(monkeypatch):
    own = tokenizer()

    def encode(*arguments, **options):
        raise Exception("no such merge")

    monkeypatch.setattr(own, "encode", encode)
    made = Rendering(whose="teacher t", tokenizer=own, template="none", options={})

    with pytest.raises(
        ConfigError, match=r"rows.jsonl:1: the teacher t's tokenizer refuses it: no such merge"
    ):
        made.token_ids([ASK], (), "rows.jsonl:1")


def test_a_template_that_writes_half_a_character_is_refused():
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: holds half a character"):
        rendered([ASK], "{{ half }}", half="\ud83d")


# --- special tokens


@pytest.mark.parametrize(
    ("adds", "text", "prompt", "note"),
    [
        ("$A", "a b", "a b", None),
        ("<|im_start|> $A", "a b", "<|im_start|>a b", None),
        (
            "<|im_start|> $A",
            "<|im_start|>a",
            "<|im_start|>a",
            "begins with the student's '<|im_start|>', which would",
        ),
        ("$A <|im_end|>", "a b", "a b", "adds '<|im_end|>' behind plain text, which is left out"),
        (
            "<|im_start|> $A <|im_end|>",
            "a b",
            "<|im_start|>a b",
            "adds '<|im_end|>' behind plain text",
        ),
        (
            "$A",
            "a<|im_end|>",
            "a<|im_end|>",
            "the prompt ends with the student's end token '<|im_end|>'",
        ),
    ],
)
def test_plain_text_has_the_tokenizer_s_first_token_once(adds, text, prompt, note):
    found, notes = rendered([{"role": "user", "content": text}], adds=adds, kind="none")
    assert found == prompt
    assert len(notes) == (note is not None)
    assert all(note in one for one in notes)


def test_a_rendered_chat_has_no_special_token_but_the_template_s():
    assert rendered(
        [ASK],
        "{{ bos_token }}{{ messages[0].content }}",
        adds="<|im_start|> $A <|im_end|>",
    ) == (
        "<|im_start|>Weather in Bonn?",
        [],
    )
    twice = {"role": "user", "content": "<|im_start|>a"}
    text, notes = rendered([twice], "{{ bos_token }}{{ messages[0].content }}")
    assert text == "<|im_start|>a"
    assert "it is there once" in notes[0]
    _, notes = rendered([ASK], "{{ messages[0].content }}{{ eos_token }}")
    assert notes == [
        "the prompt ends with the student's end token '<|im_end|>': the response comes after an end"
    ]


@pytest.mark.parametrize(
    ("chat", "tools", "message"),
    [
        ([ASK, TURN, RESULT], (), "a chat of 3 messages needs prompts.template: chat"),
        ([ASK], TOOLS, "tools: need prompts.template: chat"),
        ([{**ASK, "name": "x"}], (), "name: need prompts.template: chat"),
    ],
)
def test_plain_text_is_one_message_and_nothing_else(chat, tools, message):
    with pytest.raises(ConfigError, match=message):
        rendered(chat, tools=tools, kind="none")


# --- a data set


def load(tmp_path, *rows, view=None, **changes):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PromptsConfig.model_validate(
        {"data": "d", "held_out": "d", "max_tokens": 512} | changes
    )
    own = tokenizer(SHOWS_ALL, "<|im_start|> $A <|im_end|>")
    return own, PromptSet.load([Part(data=str(path))], config, own, lambda source: view)


def test_options_of_the_student_reach_its_template(tmp_path):
    own, found = load(tmp_path, {"prompt": "a"}, template_options={"thinking": True})
    assert own.decode(found.prompts[0].token_ids) == "<|im_start|><user>a"
    assert found.notes == ()


def test_notes_say_in_how_many_rows(tmp_path):
    answered = {"messages": [ASK, {"role": "assistant", "content": "b"}]}
    _, found = load(tmp_path, answered, {"prompt": "a"}, {**answered, "id": "x"})
    assert found.notes == (
        "prompts.data: 2 of 3 rows: the chat ends with the assistant's answer, which is "
        "left out: the prompt is what comes before",
    )
    assert found.places == {n: f"prompts.data: {tmp_path}/rows.jsonl:{n}" for n in "12"} | {
        "x": f'prompts.data: {tmp_path}/rows.jsonl:3 (id "x")'
    }


def of_teacher(own, kind):
    return Rendering(whose="teacher t", tokenizer=own, template=kind, options={})


def test_both_sides_leave_out_the_end_that_a_tokenizer_adds(tmp_path):
    view = TeacherView(
        name="t",
        template="hint {{ prompt }}",
        rendering=of_teacher(tokenizer(adds="$A <|im_end|>"), "none"),
        max_tokens=99,
    )
    own, found = load(tmp_path, {"prompt": "a"}, view=view, template="none")
    (prompt,) = found.prompts
    assert own.decode(prompt.token_ids) == "<|im_start|>a"
    assert own.decode(prompt.teacher_token_ids) == "hint a"
    assert [note.split("the ")[1][:9] for note in found.notes] == ["student's", "teacher t"]


def test_a_hint_goes_to_the_last_text_of_the_user(tmp_path):
    view = TeacherView(
        name="t",
        template="{{ prompt }} It is {{ c }}.",
        rendering=of_teacher(tokenizer(SHOWS_ALL), "chat"),
        max_tokens=512,
    )
    own, found = load(
        tmp_path,
        {"messages": [ASK, TURN, RESULT], "tools": TOOLS, "c": "cold"},
        view=view,
    )
    shown = own.decode(found.prompts[0].teacher_token_ids)
    assert shown.startswith(
        "<|im_start|><tool>get_weather<user>Weather in Bonn? It is cold.<assistant>"
    )


def test_every_kind_of_fault_is_told_once_with_its_first_row(tmp_path):
    empty, wordless = {"prompt": ""}, {"question": "a"}
    with pytest.raises(ConfigError) as refused:
        load(
            tmp_path,
            {"prompt": "a"},
            empty,
            wordless,
            empty,
            {"prompt": "b", "id": "x", "source": 1},
            empty,
        )

    told = str(refused.value).replace(str(tmp_path), "")
    assert [line[:60] for line in told.splitlines()] == [
        "prompts.data: /rows.jsonl:2 (and 2 more rows): prompt: the u",
        "prompts.data: /rows.jsonl:3: needs either `prompt` (text, or",
        'prompts.data: /rows.jsonl:5 (id "x"): source: must be text, ',
    ]


def test_only_the_first_kinds_of_fault_are_told(tmp_path):
    with pytest.raises(ConfigError) as refused:
        load(
            tmp_path,
            {"prompt": 1},
            {"prompt": " "},
            {"prompt": None},
            {"other": 1},
            {"messages": []},
            {"prompt": "a", "id": []},
            {"prompt": "a", "source": 3},
            {"prompt": "a", "answer": {}},
            {"prompt": "a", "tools": 3},
        )

    assert str(refused.value).count("\n") == 5
    assert str(refused.value).endswith("\n4 more rows have other mistakes")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ({"id": 1}, {"id": "1"}),
            r"rows.jsonl:2 \(id \"1\"\): id: '1' stands twice: .*rows.jsonl:1 \(id 1\)",
        ),
        (
            ({"id": 2}, {}),
            r"rows.jsonl:2: id: '2' stands twice: .*rows.jsonl:1 \(id 2\).* "
            r"without an id is called",
        ),
    ],
)
def test_ids_that_are_the_same_as_text_are_refused(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, *({"prompt": "a", **row} for row in rows))
