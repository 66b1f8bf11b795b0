"""Rows to prompts, and issue numbers to samples."""

import itertools
import json
import os
import re
from collections import Counter
from fractions import Fraction

import fakes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopd.config import ConfigError, Part, PromptsConfig
from eopd.prompts import PromptOrder, PromptSet, TeacherView, read_data
from eopd.prompts.rendering import Rendering


class WordTokenizer:
    """A tokenizer of whole words: ids are lengths."""

    chat_template = "words"
    bos_token_id = 3  # <s>
    eos_token_id = 4  # </s>

    def encode(self, text, *, add_special_tokens=True):
        return [len(word) for word in text.split()]

    def decode(self, token_ids):
        return {3: "<s>", 4: "</s>"}[token_ids[0]]

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        return " ".join(f"<{m['role']}> {m['content']}" for m in conversation) + " <assistant>"


def config(**changes):
    return PromptsConfig(**({"data": "made-up", "held_out": "made-up", "max_tokens": 6} | changes))


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return str(path)


def load(tmp_path, *rows, **changes):
    parts = [Part(data=write(tmp_path, *rows))]
    return PromptSet.load(parts, config(**changes), WordTokenizer())


def test_prompts_and_chats_are_rendered(tmp_path):
    found = load(
        tmp_path,
        {"prompt": "a bb", "id": "x", "answer": 7, "source": "math"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "ccc"}]},
        suffix=" end",
    ).prompts
    assert [p.token_ids.tolist() for p in found] == [[6, 1, 2, 3, 11], [8, 1, 6, 3, 3, 11]]
    assert [(p.prompt_id, p.source, p.reference_answer) for p in found] == [
        ("x", "math", "7"),
        ("2", "default", None),
    ]


def test_parquet_holds_the_same_rows(tmp_path):
    import datasets

    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{"prompt": "a bb", "id": "x"}]).to_parquet(str(path))
    assert [row.columns for row in read_data(str(path))] == [{"prompt": "a bb", "id": "x"}]


def test_overlong_prompts_are_an_error_or_dropped_and_counted(tmp_path):
    rows = {"prompt": "short"}, {"prompt": "one two three four five six seven"}
    with pytest.raises(
        ConfigError,
        match=r"rows.jsonl:2: 1 of 2 rows is longer than prompts.max_tokens 6; this is the",
    ):
        load(tmp_path, *rows)

    kept = load(tmp_path, *rows, overlong="drop")
    assert len(kept.prompts) == 1
    assert kept.notes == ("prompts.data: 1 of 2 rows: left out, longer than prompts.max_tokens 6",)
    with pytest.raises(ConfigError, match=r"all 1 rows are longer than prompts\.max_tokens 6"):
        load(tmp_path, rows[1], overlong="drop")


def test_overlong_prompts_are_one_line_with_the_longest(tmp_path):
    rows = [{"prompt": " ".join(["word"] * number)} for number in (5, 9, 6, 1, 20, 7, 8)]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *rows)

    assert str(caught.value) == (
        f"prompts.data: {tmp_path}/rows.jsonl:5: 6 of 7 rows are longer than "
        "prompts.max_tokens 6; this is the longest, with 22 tokens: shorten what is too "
        "long, raise the limit to 22 (--max-prompt-tokens of eopd eval), or set "
        "prompts.overlong: drop"
    )
    load(tmp_path, *rows, max_tokens=22)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "has no rows"),
        (("{",), r"rows.jsonl:1: is not JSON"),
        (("[1]",), r"rows.jsonl:1: must be an object such as .*, is \[1\]"),
        (({"question": "?"},), "needs either `prompt`"),
    ],
)
def test_bad_rows_are_one_clear_error(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, *rows)


def test_missing_files_and_unknown_kinds_are_one_clear_error(tmp_path):
    for spec, message in (
        (str(tmp_path / "no.jsonl"), "cannot be read"),
        (str(tmp_path / "no.parquet"), "cannot be read"),
        (str(tmp_path / "nothing-here"), "cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_data(spec)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match=r"rows.jsonl is no file; a pipe can be read only once"):
        read_data(str(pipe), "prompts.data")


def test_a_chat_needs_the_chat_template(tmp_path):
    chat = {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}
    with pytest.raises(ConfigError, match="a chat of 2 messages needs"):
        load(tmp_path, chat, template="none")

    assert load(
        tmp_path,
        {"prompt": "a bb"},
        template="none",
    ).prompts[0].token_ids.tolist() == [
        1,
        2,
    ]


def test_order_is_a_pure_function_of_seed_and_number(tmp_path):
    prompts = load(tmp_path, *({"prompt": "w" * i, "id": i - 1} for i in range(1, 8))).prompts
    order, again = (PromptOrder(prompts, samples_per_prompt=3, seed=5) for _ in range(2))
    first = [order.at(i) for i in range(42)]
    assert [(s.epoch, s.prompt_id, k) for s, k in map(again.at, range(41, -1, -1))] == [
        (s.epoch, s.prompt_id, k) for s, k in reversed(first)
    ]
    names = [(s.epoch, s.prompt_id, k) for s, k in first]
    assert Counter(names) == Counter(
        (e, str(i), k) for e in (0, 1) for i in range(7) for k in range(3)
    )
    assert [n[1] for n in names[:21]] != [n[1] for n in names[21:]]
    seeds = [order.sampling(i, temperature=1.0, max_tokens=4).seed for i in range(42)]
    assert len(set(seeds)) == 42
    assert seeds == [
        again.sampling(
            i,
            temperature=1.0,
            max_tokens=4,
        ).seed
        for i in range(42)
    ]


def test_without_weights_the_order_is_the_one_that_runs_of_before_have():
    prompts = [fakes.prompt(str(number)) for number in range(7)]
    order = PromptOrder(prompts, samples_per_prompt=2, seed=5)
    assert "".join(order.at(issue)[0].prompt_id for issue in range(0, 42, 2)) == (
        "1423650" "4206531" "0453126"
    )  # fmt: skip


# --- parts with weights

mixes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=4)


def mixed(mix, samples=1, seed=0):
    """An order of parts; each is its number of prompts and its turns."""
    parts = [
        [fakes.prompt(f"{part}/{number}") for number in range(size)]
        for part, (size, _) in enumerate(mix)
    ]
    return PromptOrder(
        list(itertools.chain(*parts)),
        samples_per_prompt=samples,
        seed=seed,
        parts=parts,
        turns=[turns for _, turns in mix],
    )


def parts_of(order, issues):
    return [int(order.at(issue)[0].prompt_id[0]) for issue in issues]


def test_parts_come_in_turn_by_their_weights():
    assert parts_of(mixed([(5, 3), (5, 1)]), range(8)) == [0, 0, 1, 0] * 2
    assert parts_of(mixed([(5, 2), (5, 3)]), range(10)) == [1, 0, 1, 0, 1] * 2
    assert parts_of(mixed([(5, 1), (1, 1)], samples=2), range(6)) == [0, 0, 1, 1, 0, 0]


@given(mixes, st.integers(1, 60))
def test_the_part_that_is_furthest_behind_its_share_comes_next(mix, length):
    """The oracle counts from the start, as seats of a parliament are given out (Sainte-Lague)."""
    had, expected = [0] * len(mix), []
    for _ in range(length):
        claims = [
            Fraction(turns, 2 * n + 1)
            for n, (_, turns) in zip(
                had,
                mix,
                strict=True,
            )
        ]
        expected.append(claims.index(max(claims)))
        had[expected[-1]] += 1

    assert parts_of(mixed(mix), range(length)) == expected


@given(mixes, st.integers(1, 3), st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_a_mixed_order_is_a_pure_function_and_gives_nothing_twice(mix, samples, seed, random):
    issues = list(range(150))
    order = mixed(mix, samples, seed)
    keys = [(p.epoch, p.prompt_id, sample) for p, sample in map(order.at, issues)]
    assert len(set(keys)) == len(keys)

    random.shuffle(issues)
    again = mixed(mix, samples, seed)
    found = {issue: again.at(issue) for issue in issues}
    assert keys == [(p.epoch, p.prompt_id, sample) for _, (p, sample) in sorted(found.items())]


def test_a_small_part_repeats_in_epochs_of_its_own():
    order = mixed([(6, 1), (2, 1)])
    told = [order.at(issue)[0] for issue in range(12)]
    small = [(prompt.epoch, prompt.prompt_id) for prompt in told if prompt.prompt_id[0] == "1"]
    assert [sorted(small[begin : begin + 2]) for begin in (0, 2, 4)] == [
        [(epoch, "1/0"), (epoch, "1/1")] for epoch in range(3)
    ]
    assert {prompt.epoch for prompt in told if prompt.prompt_id[0] == "0"} == {0}


def test_the_mixed_order_is_the_one_that_runs_of_before_have():
    order = mixed([(5, 3), (5, 2)], seed=5)
    told = [order.at(issue)[0].prompt_id for issue in range(15)]
    assert " ".join(told) == "0/4 1/4 0/3 1/0 0/1 0/2 1/2 0/0 1/3 0/2 0/0 1/1 0/4 1/1 0/3"
    apart = [[name[2] for name in told if name[0] == part][:5] for part in "01"]
    assert sorted(apart[0]) == sorted(apart[1]) and apart[0] != apart[1]


def test_another_seed_is_another_order_of_the_same_parts():
    first, second = (mixed([(6, 2), (6, 1)], seed=seed) for seed in (1, 2))
    assert parts_of(first, range(18)) == parts_of(second, range(18))
    orders = [[order.at(issue)[0].prompt_id for issue in range(18)] for order in (first, second)]
    assert orders[0] != orders[1]


# --- prompts that only the teacher sees


class LoudTokenizer(WordTokenizer):
    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt, mark=""):
        return super().apply_chat_template(
            conversation, tokenize=tokenize, add_generation_prompt=add_generation_prompt,
        ) + mark  # fmt: skip


def view(template="hint {{ solution }} for {{ prompt }}", kind="chat", max_tokens=20, **options):
    rendering = Rendering(
        whose="teacher t", tokenizer=LoudTokenizer(), template=kind, options=options
    )
    return TeacherView(name="t", template=template, rendering=rendering, max_tokens=max_tokens)


def load_for(tmp_path, teacher, *rows, **changes):
    taught = {"math": teacher}
    return PromptSet.load(
        [Part(data=write(tmp_path, *rows))],
        config(**changes),
        WordTokenizer(),
        taught.get,
    ).prompts


def test_a_teacher_reads_its_own_prompt_and_the_student_does_not(tmp_path):
    rows = (
        {"prompt": "a bb", "source": "math", "solution": "ssss"},
        {"prompt": "a bb", "solution": "ssss"},
    )
    taught, other = load_for(tmp_path, view(mark="!!"), *rows, suffix=" end")
    assert taught.token_ids.tolist() == other.token_ids.tolist() == [6, 1, 2, 3, 11]
    # hint ssss for a bb end <assistant>!!
    assert taught.teacher_token_ids.tolist() == [6, 4, 4, 3, 1, 2, 3, 13]
    assert other.teacher_token_ids is None


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{prompt}", "prompt"),
        ("Hint: { solution } for {{ prompt }}", "solution"),
        ("Q:{prompt}\nA:", "prompt"),
    ],
)
def test_single_braces_around_a_column_are_refused(tmp_path, template, name):
    rows = [{"prompt": "a", "source": "math", "solution": "s"}] * 2
    with pytest.raises(ConfigError) as caught:
        load_for(tmp_path, view(template), *rows)

    message = (
        r"teachers.t.template: prompts.data: .*rows.jsonl:1 \(and 1 more row\): "
        rf"\{{ ?{name} ?\}} is plain text there; "
        rf"write \{{\{{ {name} \}}\}} to have the column in its place"
    )
    assert re.fullmatch(message, str(caught.value))


@pytest.mark.parametrize(
    "template",
    [
        r"\boxed{prompt} {{ prompt }}",
        "x_{prompt} {{ prompt }}",
        "{other} {{ prompt }}",
        "{% if prompt %}{{prompt}}{% endif %}",
    ],
)
def test_other_braces_of_a_template_are_text(tmp_path, template):
    load_for(tmp_path, view(template), {"prompt": "a", "source": "math"})


def test_a_template_without_a_column_is_noted(tmp_path):
    rows = [{"prompt": "a", "source": "math"}] * 2
    for template, notes in (
        ("say yes", 1),
        ("{{ prompt }}", 0),
        ("{% if prompt %}a{% endif %}", 0),
    ):
        taught = {"math": view(template)}
        found = PromptSet.load(
            [Part(data=write(tmp_path, *rows))],
            config(),
            WordTokenizer(),
            taught.get,
        ).notes
        assert (
            found
            == (
                "prompts.data: 2 of 2 rows: the template of teacher t uses no column, so "
                "that it asks the same in every row",
            )
            * notes
        )


def test_a_template_is_text_and_no_file(tmp_path):
    (tmp_path / "hint.jinja").write_text("{{ prompt }}")
    for template, message in (
        ("", "is empty; write {{ prompt }} and what"),
        (" \n", "is empty"),
        (
            f"{tmp_path}/hint.jinja",
            f"{tmp_path}/hint.jinja is a file; write its text here, below `template: |`",
        ),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"teachers.t.template: {message}")):
            view(template).require_text()

    for template in ("{{ prompt }}", "x" * 5000, "x/" * 3000, str(tmp_path)):
        view(template).require_text()


def test_what_is_too_long_for_a_teacher_is_one_line(tmp_path):
    rows = [
        {"prompt": " ".join(["word"] * number), "source": "math", "solution": "s"}
        for number in (1, 3, 4)
    ]
    with pytest.raises(ConfigError) as caught:
        load_for(tmp_path, view(max_tokens=6), *rows)

    assert str(caught.value) == (
        f"prompts.data: {tmp_path}/rows.jsonl:3: 2 of 3 rows are longer than "
        "teachers.t.max_prompt_tokens 6 in its template; this is the longest, with 9 "
        "tokens: shorten what is too long, raise the limit to 9, or set prompts.overlong: drop"
    )
    parts, settings = [Part(data=write(tmp_path, *rows))], config(overlong="drop")
    kept = PromptSet.load(parts, settings, WordTokenizer(), {"math": view(max_tokens=6)}.get)
    assert [prompt.prompt_id for prompt in kept.prompts] == ["1"]
    assert kept.notes == (
        "prompts.data: 2 of 3 rows: left out, longer than teachers.t.max_prompt_tokens 6 in "
        "its template",
    )


def test_kinds_of_mistakes_beyond_the_first_five_are_counted(tmp_path):
    values = (1, [], {}, True, "", [1], [1], 1)
    wrong = [{"prompt": "a", "source": value} for value in values]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *wrong, {"prompt": []}, {"prompt": {}})

    first, *_, last = told = str(caught.value).splitlines()
    assert "rows.jsonl:1 (and 1 more row): source: must be text, is the number 1" in first
    assert len(told) == 6
    assert last == "4 more rows have other mistakes"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": number} for number in range(40)],
            "rows.jsonl:1 (and 39 more rows): prompt: must be text or a list of messages, is the number 0",
        ),
        (
            [{"messages": [{"role": role, "content": "?"}]} for role in ("human", "gpt", "x" * 70)],
            "rows.jsonl:1 (and 2 more rows): messages, number 1, role: must be one of",
        ),
        (
            [{"prompt": "a", "id": "ab"[number % 2]} for number in range(6)],
            'rows.jsonl:3 (id "a") (and 3 more rows): id: ' + "'a' stands twice: it is that of",
        ),
    ],
)
def test_rows_that_differ_in_a_value_alone_have_one_mistake(tmp_path, rows, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *rows)

    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            {"from": "human", "value": "?"},
            "has no role and no content; its fields are `from`, `value`.",
        ),
        ({"role": "user", "value": "?"}, "has no content; its fields are `role`, `value`."),
        ({}, "has no role and no content; its fields are none."),
    ],
)
def test_a_message_with_other_fields_names_them(tmp_path, message, words):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {"messages": [message]})

    assert f"messages, number 1: {words} A message has a role, one of" in str(caught.value)


def test_earlier_messages_stay_and_plain_prompts_stay_plain(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "ccc"}]
    (found,) = load_for(
        tmp_path,
        view("{{ prompt }} {{ answer }}"),
        {"messages": chat, "answer": 7, "source": "math"},
    )
    assert found.teacher_token_ids.tolist() == [8, 1, 6, 3, 1, 11]
    (plain,) = load_for(
        tmp_path,
        view("see {{ prompt }}", kind="none"),
        {"prompt": "a", "source": "math"},
        template="none",
    )
    assert plain.teacher_token_ids.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"teachers.t.template: .*rows.jsonl:1: 'solution' is undefined"),
        ({"template": "{{ prompt"}, "teachers.t.template: .*unexpected end of template"),
        ({"template": "{{ prompt.__class__.__mro__ }}"}, "teachers.t.template: .*unsafe"),
        (
            {"template": "one two", "max_tokens": 3},
            "rows.jsonl:1: 1 of 1 rows is longer than teachers.t.max_prompt",
        ),
    ],
)
def test_a_template_that_cannot_be_filled_is_the_user_s_mistake(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_for(tmp_path, view(**changes), {"prompt": "a", "source": "math"})
