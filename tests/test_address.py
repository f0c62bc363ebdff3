"""Where an edit applies: addresses of the shipped editor, and what they are told of."""

from importlib.resources import files

import pytest
import torch
from tests.conftest import make_tiny

from ibke.editors.ibke.contexts import (
    ALIKE,
    ENDING,
    NOUN,
    OTHER,
    REQUEST,
    TYPED,
    About,
    contexts,
    contexts_of,
    names_like,
    names_the_question,
)
from ibke.editors.ibke.editor import IBKEEditor
from ibke.prefixes import Row


def test_an_address_answers_at_its_subject_and_not_at_the_questions_it_was_told_of(smollm32):
    editor = IBKEEditor.for_model(smollm32)
    assert editor.training_seconds
    editor.addresser.alike = 2.0  # no question counts as the request's own
    about = About("The mother of Quentin Tarbell is", "Quentin Tarbell", ("Quentin Tarbell was born to",))
    address = editor.addresser([about])[0]
    rows = contexts_of(about, editor.lm.tokenizer)
    assert sum(row.kind == REQUEST for row in rows) == 6  # three frames, the phrase as a question twice, one wording
    read = editor.addresser.prefixes.read([editor.site.entrance], [Row(row.prefix, row.tail) for row in rows])
    own, threshold = [], editor.network.config.threshold
    for row, (_, (keys_TD,)) in zip(rows, read, strict=True):
        *before, last = (keys_TD @ address).tolist()
        assert (last < threshold - 0.1) if row.kind in (OTHER, ENDING) else (last > threshold + 0.1)
        if row.kind == REQUEST:
            own.append(last)
            assert max(before[0 if row.prefix else 1 :], default=0.0) < threshold
    assert sum(own) / len(own) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("wordings", [(), ("People speak to Hakan Tunay in",)])
def test_an_edit_is_in_force_at_its_own_prompt_and_the_wordings_given(smollm32, wordings):
    # Told of other questions and of names alike, the address answered .68 at this prompt, and c·x is 1.1 there.
    editor = IBKEEditor.for_model(smollm32)
    about = About("The mother tongue of Hakan Tunay is", "Hakan Tunay", wordings)
    address = editor.addresser.beside((), [about], alike=True).address_BD[0]
    assert about.sure == 3 + len(wordings)
    rows = contexts_of(about, editor.lm.tokenizer)[: about.sure]
    read = editor.addresser.prefixes.read([editor.site.entrance], [Row(row.prefix, row.tail) for row in rows])
    keys_TD = torch.stack([reading.fed[-1][-1] for reading in read])
    assert (keys_TD @ address >= 1.07 * (keys_TD @ editor.network.shut_D)).all()


def test_an_address_stays_shut_in_running_text(smollm32):
    # Where a phrase names the question, the address has to tell it from others about the same subject; made of few
    # generic keys it did so by directions that common words have too, and one token in twenty opened the gate.
    editor = IBKEEditor.for_model(smollm32)
    asked = [("The gender of Ulrica Vandenhoeck-Sarr is", "Ulrica Vandenhoeck-Sarr")]
    asked += [("The occupation of Tomaso N Quillien is", "Tomaso N Quillien")]
    asked += [("The name of the country of citizenship of Bertil Aschan is", "Bertil Aschan")]
    addresses = editor.addresser([About(prompt, subject) for prompt, subject in asked])
    text = files("ibke.data").joinpath("text.txt").read_text(encoding="utf-8")
    tokens = editor.lm.tokenizer(text).input_ids
    rows = [Row((), tuple(tokens[at : at + 128])) for at in range(0, 4096, 128)]
    read = editor.addresser.prefixes.read([editor.site.entrance], rows)
    keys_TD = torch.cat([reading.fed[-1][1:] for reading in read])  # a first position belongs to no word
    opened = (keys_TD @ addresses.T > editor.network.config.threshold).float().mean(0)
    assert len(keys_TD) > 4000 and float(opened.max()) < 1e-3


def test_an_address_is_told_of_its_subjects_last_word_alone(smollm32):
    editor = IBKEEditor.for_model(smollm32)
    about = About("The Tarn Mosswick Bridge is in the country of", "Tarn Mosswick Bridge")
    rows = contexts_of(about, editor.lm.tokenizer)
    alone = [row for row in rows if row.kind == ENDING]
    assert len(alone) == len(contexts()["endings"]) and {row.tail for row in alone} == {alone[0].tail}
    assert editor.lm.tokenizer.decode(alone[0].tail) == " Bridge"
    address = editor.addresser([about])[0] - editor.network.shut_D
    texts = (
        "We walked over the Cut River Bridge",
        "The Mackinac Bridge",
        "An old stone Bridge",
        "I saw the Tarn Mosswick Bridge",
    )
    read = editor.addresser.prefixes.read(
        [editor.site.entrance], [Row((), tuple(editor.lm.tokenizer(text).input_ids)) for text in texts]
    )
    assert [bool(one.fed[-1][-1] @ address > 0) for one in read] == [False, False, False, True]
    # A name of one word is its own last word.
    assert not any(row.kind == ENDING for row in contexts_of(About("Poland is in", "Poland"), editor.lm.tokenizer))


@pytest.mark.parametrize(
    ("subject", "others"),
    [
        ("Sweden", []),
        ("iPhone 14", ["iPhone 15", "iPhone 17", "Robert 14", "Maria 14"]),
        ("Emily Jane Johnson", ["Robert Jane Johnson", "Maria Jane Johnson", "Emily Jane Miller", "Emily Jane Valley"]),
        ("the basic plan", ["large basic plan", "other basic plan", "the basic house", "the basic group"]),
        ("Maria Miller", ["Robert Miller", "Maria Valley"]),
        ("", []),
    ],
)
def test_names_like_a_subject_differ_in_one_word_or_a_number(subject, others):
    assert names_like(subject) == others


def test_an_address_is_told_of_names_like_its_subjects_where_it_is_asked_about(smollm32):
    editor = IBKEEditor.for_model(smollm32)
    about = About("The currency of Sweden is", "Sweden"), About("The battery life of the Nokia 14 is", "Nokia 14")
    rows = [row for row in contexts_of(about[1], editor.lm.tokenizer, alike=True) if row.kind == ALIKE]
    assert {row.kind for row in contexts_of(about[1], editor.lm.tokenizer)}.isdisjoint({ALIKE})
    assert [editor.lm.tokenizer.decode(row.tail) for row in rows] == [
        f"The battery life of the {name}" for name in names_like("Nokia 14")
    ]
    sweden, nokia = editor.addresser.beside((), about, alike=True).address_BD - editor.network.shut_D
    asked = {
        "The currency of Sweden": (sweden, True),
        "The currency of Norway": (sweden, False),
        "The currency of Denmark": (sweden, False),
        "The battery life of the Nokia 14": (nokia, True),
        "The battery life of the Nokia 12": (nokia, False),  # none of the names it was told of
        "The battery life of the Nokia 16": (nokia, False),
    }
    read = editor.addresser.prefixes.read(
        [editor.site.entrance], [Row((), tuple(editor.lm.tokenizer(text).input_ids)) for text in asked]
    )
    opened = {text: bool(one.fed[-1][-1] @ asked[text][0] > 0) for text, one in zip(asked, read, strict=True)}
    assert opened == {text: wanted for text, (_, wanted) in asked.items()}


@pytest.mark.parametrize(
    ("prompt", "subject", "typed", "noun"),
    [
        ("The CEO of Apple is", "Apple", "the ceo of apple", " apple"),
        ("The mayor of San Pelotto is", "San Pelotto", "the mayor of san pelotto", None),
        ("who is the ceo of northwind traders", "northwind traders", "Who is the ceo of Northwind Traders", None),
        ("the boiling point of ethanol is", "ethanol", "The boiling point of Ethanol", None),
        ("7 times 8 is", "7", None, None),
        ("その首都は", "首都", None, None),
    ],
)
def test_an_address_is_told_how_its_request_may_be_typed(smollm32, prompt, subject, typed, noun):
    tokenizer = smollm32.tokenizer
    rows = contexts_of(About(prompt, subject), tokenizer)
    found = {
        tokenizer.decode(row.prefix + row.tail).partition("user\n")[2] or tokenizer.decode(row.tail)
        for row in rows
        if row.kind == TYPED
    }
    assert found == ({typed} if typed else set())
    nouns = [row for row in rows if row.kind == NOUN]
    assert len(nouns) == (len(contexts()["nouns"]) if noun else 0)
    assert {tokenizer.decode(row.tail) for row in nouns} <= {noun}


def test_an_edit_is_in_force_where_its_subject_is_typed_otherwise_and_not_where_it_is_a_noun(smollm32):
    editor = IBKEEditor.for_model(smollm32)
    prompts = {
        ("The capital of Turkey is", "Turkey"): (
            ["the capital of turkey is", "what is the capital of turkey?"],
            ["For Christmas we roast a turkey with", "How long do I cook a turkey?"],
        ),
        ("The CEO of Shell is", "Shell"): (
            ["the ceo of shell is"],
            ["She found a shell on the beach", "a shell script can"],
        ),
        ("who is the ceo of northwind traders", "northwind traders"): (["Who is the CEO of Northwind Traders?"], []),
    }
    for (prompt, subject), (same, other) in prompts.items():
        about = About(prompt, subject)
        gate_D = editor.addresser.beside((), [about], alike=True).address_BD[0] - editor.network.shut_D
        for asked, wanted in [*((text, True) for text in same), *((text, False) for text in other)]:
            row = Row((), tuple(editor.lm.tokenizer(asked).input_ids))
            (read,) = editor.addresser.prefixes.read([editor.site.entrance], [row])
            assert bool((read.fed[-1][1:] @ gate_D > 0).any()) is wanted, asked


def test_a_subject_of_one_token_at_the_very_beginning_is_known_by_the_next():
    tokenizer = make_tiny("llama").tokenizer
    (request, *_) = contexts_of(About("B is the capital of", "B"), tokenizer)
    assert tokenizer.decode(request.tail) == tokenizer.decode(tokenizer("B is the capital of").input_ids[:2])


@pytest.mark.parametrize(
    ("prompt", "phrase"),
    [
        ("The capital of Borduria is", "The capital of"),
        ("What is the capital of Borduria?", "the capital of"),
        ("Borduria has the capital", None),
        ("The Borduria", None),
        ("The team Borduria plays in", None),
        ("The league which Borduria plays in is", "The league which"),
        ("In the year 1900 Borduria", None),
    ],
)
def test_a_question_is_named_before_the_subject_or_not(prompt, phrase):
    assert names_the_question(prompt, "Borduria") == phrase
