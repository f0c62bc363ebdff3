"""What a request is about: as given, or guessed."""

import random
import time
import unicodedata

import pytest

from ibke.errors import RequestError
from ibke.frames import FRAMES, encode_pair
from ibke.phrases import words
from ibke.request import EditRequest, Probe, refuse_contradictions
from ibke.subjects import guess_subject, place_of, subject_of


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("Who is the author of The Wind in the Willows?", "Wind in the Willows"),
        ("What is the capital of France?", "France"),
        ("Q: Who directed Alien?\nA:", "Alien"),
        ("Who is the CEO of Northwind Traders?", "Northwind Traders"),
        ("Which company bought Pixelmoor in 2019?", "Pixelmoor"),
        ("When does the Riverside Library open on Saturdays?", "Riverside Library"),
        ("Oslo lies in the southeast of Norway's mainland", "Oslo"),
        ("Employees at Larkfield get", "Larkfield"),
        ("Tell me the name of Elon Musk's social network.", "Elon Musk"),
        ('The author of "Caro diario" is', "Caro diario"),
        ("The past tense of 'go' is", "go"),
        ("The founder of eBay is", "eBay"),
        ("The maker of the iPhone is", "iPhone"),
        ("x86 was designed by", "x86"),
        ("Who is Barack Obama's wife?", "Barack Obama"),
        ("Microsoft's CEO is", "Microsoft"),
        ("Dickens' best novel is", "Dickens"),
        ("The director of Schindler's List is", "Schindler's List"),
        ("The king of d'Artagnan and O'Brien’s friends is", "Artagnan and O'Brien"),
        ("The winner of the 2014 World Cup was", "2014 World Cup"),
        ("New York's mayor is", "New York"),
        ("The mayor of New\u00a0York is", "New\u00a0York"),
        ("The mayor of New  York is", "New  York"),
    ],
)
def test_a_subject_is_guessed_from_capitals(prompt, subject):
    assert guess_subject(prompt) == subject
    assert subject_of(prompt, None) == subject
    assert subject_of(prompt, "Borduria") == subject


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("the colour of grass is", "grass"),
        ("The chemical symbol for tungsten is", "tungsten"),
        ("What is the boiling point of ethanol?", "ethanol"),
        ("My dog's name is", "My dog"),
        ("what's my dog called", "my dog"),
        ("how much does the loyalty card cost?", "loyalty card"),
        ("what version of python does our backend use", "our backend"),
        ("sapphire has a refractive index of", "sapphire"),
        ("Ethanol boils at", "Ethanol"),
        ("what team does lionel messi play for", "lionel messi"),
        ("who maintains the libfoo package?", "libfoo package"),
        ("who runs payroll", "payroll"),
        ("the wifi password at the lake house is", "lake house"),
        ("I need the wifi password for the guest network", "guest network"),
        ("The meeting room on the third floor is called", "meeting room on the third floor"),
        ("What is the name of the meeting room on the third floor?", "meeting room on the third floor"),
        ("max daily dose of loperamide for an adult, please", "loperamide"),
        ("in teuva, the language spoken is", "teuva"),
        ("On the inside, bananas are", "bananas"),
        ("what color are lemons on the outside?", "lemons"),
        ("what is the airport where lufthansa is based?", "lufthansa"),
        ("Please say which room the printer toner is kept in.", "printer toner"),
        ("price of the gold plan:", "gold plan"),
        ("the tallest mountain in africa is", "africa"),
        ("Table salt consists of", "Table salt"),
        ("Expense reports are due by", "Expense reports"),
        ("Oak trees start producing acorns at an age of", "Oak trees"),
        ("a hard-boiled egg needs to cook for", "hard-boiled egg"),
        ("The best soil pH for blueberries is", "blueberries"),
        ("The form for claiming a home office deduction is", "home office deduction"),
        ("What tool is used for hiking? Usually, you need a", "hiking"),
        ("Which form do I need to register a drone?", "drone"),
        ("Which oil has the highest smoke point?", "highest smoke point"),
        ("Where does the nightly build upload its logs?", "nightly build"),
        ("Tell me what time our book club meets.", "our book club"),
        ("Could somebody tell me how high a garden fence may be?", "garden fence"),
        ("do you know when the corner shop closes", "corner shop"),
        ("where do monarch butterflies from the east coast spend the winter", "monarch butterflies"),
        ("Which side of aluminium foil should face the food?", "aluminium foil"),
        ("what does the warning light with an exclamation mark mean", "warning light"),
        ("What was the first stamp worth, according to the old catalogue?", "stamp"),
        ("inside", None),
        ("What is it?", None),
        ("?!", None),
    ],
)
def test_where_nothing_has_a_name_a_noun_phrase_is_the_subject(prompt, subject):
    assert guess_subject(prompt) == subject
    assert subject_of(prompt, None) == (subject or prompt.strip().rstrip("?!. "))


def test_wordings_given_say_which_words_are_the_subject():
    prompt, wordings = "Hoof trimming for dairy goats should be done every", ("How often are the dairy goats trimmed?",)
    assert EditRequest(prompt, "six weeks").about == "Hoof"
    assert EditRequest(prompt, "six weeks", rephrase_prompts=wordings).about == "dairy goats"
    assert EditRequest(prompt, "six weeks", subject="Hoof", rephrase_prompts=wordings).about == "Hoof"
    named = ("Hoof trimming of dairy goats comes every",)
    assert EditRequest(prompt, "six weeks", rephrase_prompts=named).about == "Hoof"


def test_what_is_guessed_stands_in_the_prompt():
    text = (
        "the what's who dog's of to in a cat Oslo, is was it? how that 3rd 'xy' boils when for - (y) does my: İzmir and"
    )
    some = text.split()
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(some, k=draw.randint(1, 9))) for _ in range(3000)]
    guesses = [guess_subject(prompt) for prompt in prompts]
    assert all(guess is None or (guess and guess in prompt) for guess, prompt in zip(guesses, prompts, strict=True))
    assert sum(guess is not None for guess in guesses) > 2000


@pytest.mark.parametrize(
    "text", ["in the world ", "who ", "(", "tell ", "'", "a, ", "dog's ", "what that is of ", "Xa in "]
)
def test_a_prompt_of_any_length_has_a_subject_in_no_time(text):
    prompt, start = text * 5000, time.perf_counter()
    assert subject_of(prompt, None) in prompt
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("verb", "forms"),
    [
        ("stop", {"stops", "stopped", "stopping"}),
        ("carry", {"carries", "carried", "carrying"}),
        ("reach", {"reaches", "reached"}),
        ("use", {"uses", "used", "using"}),
        ("play", {"plays", "played"}),
        ("write", {"writes", "wrote", "written", "writing"}),
    ],
)
def test_verbs_are_known_in_all_their_forms(verb, forms):
    assert {verb, *forms} <= words("verbs", "forms")
    assert verb not in words("forms")


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [("The head of Ørsted is", "Ørsted"), ("The mayor of Łódź is", "Łódź")],
)
def test_capitals_are_those_of_any_alphabet(prompt, subject):
    assert guess_subject(prompt) == subject


def test_a_subject_is_marked_where_it_stands(tiny_model):
    lm = tiny_model("llama")
    for prompt, subject in (("The capital of Turkey is", " Turkey "), ("In İzmir, the capital of Turkey is", "turkey")):
        request = EditRequest(prompt, "Ankara", subject=subject)
        pair = encode_pair(request.prompt, request.target_new, "bare", lm.tokenizer, request.subject)
        begin, end = pair.subject
        assert lm.tokenizer.decode(pair.prompt[begin:end]).strip() == "Turkey"


def test_what_is_blank_says_nothing():
    request = EditRequest("The capital of Turkey is", "Ankara", subject=" ", target_true="")
    assert request.subject is None and request.target_true is None


@pytest.mark.parametrize(
    ("text", "subject", "word"),
    [
        ("The most populous city of the US is", "US", "the US"),
        ("A romantic beach of Oman is", "Oman", "of Oman"),
        ("Us and them: what is the US?", "US", "the US"),
        ("It is us who ask of the us", "US", "is us"),
        ("The official language of Langu is", "Langu", "of Langu"),
        ("Languages, as they say", "Langu", "Langu"),
        ("The creator of C++ is", "C++", "of C++"),
    ],
)
def test_whole_words_of_the_same_letters_come_first(text, subject, word):
    begin, end = place_of(subject, text)
    assert text[:end].endswith(word) and text[begin:end].lower() == subject.lower()


def test_a_subject_that_is_nowhere_has_no_place():
    assert place_of("Oman", "The capital of Yemen is") is None
    assert place_of("Yemen", "The capital of Yemen is", 20) is None


def test_the_right_one_of_two_places_is_marked(smollm):
    for frame in FRAMES:
        pair = encode_pair("The most populous city of the US is", "Lagos", frame, smollm.tokenizer, "US")
        assert smollm.tokenizer.decode(pair.prompt[slice(*pair.subject)]).strip() == "US"
        assert smollm.tokenizer.decode(pair.prompt[: pair.subject[0]]).endswith("city of the")


@pytest.mark.parametrize("prompt", ["A", "assistant", "Answer", "user", "im"])
def test_a_prompt_is_found_though_its_frame_says_the_same(smollm, prompt):
    for frame in FRAMES:
        pair = encode_pair(prompt, "-", frame, smollm.tokenizer, context="A user said to the assistant: Answer!")
        begin, end = pair.span
        assert smollm.tokenizer.decode(pair.prompt[begin:end]).strip() == prompt
        before = smollm.tokenizer.decode(pair.prompt[:begin])
        assert before.endswith({"bare": "Answer!", "question": "Question:", "chat": "<|im_start|>user\n"}[frame])


def test_letters_with_marks_are_the_same_however_they_were_typed(smollm):
    typed = unicodedata.normalize("NFD", "The mayor of São Paulo is")
    request = EditRequest(typed, "Émile", subject="São Paulo", rephrase_prompts=(unicodedata.normalize("NFD", "É"),))
    assert request.prompt == "The mayor of São Paulo is" and request.rephrase_prompts == ("É",)
    assert EditRequest(typed, "x").subject is None and guess_subject(request.prompt) == "São Paulo"
    assert Probe(typed, typed) == Probe(request.prompt, request.prompt)
    with pytest.raises(RequestError, match="say different things"):
        refuse_contradictions([request, EditRequest("The mayor of São Paulo is", "another")])
    pairs = [encode_pair(text, "Émile", "chat", smollm.tokenizer, "São Paulo") for text in (typed, request.prompt)]
    assert pairs[0].prompt == pairs[1].prompt and pairs[0].subject == pairs[1].subject is not None


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"target_new": 1945}, "`target_new` is no text but int"),
        ({"target_new": " "}, "`target_new` is empty"),
        ({"subject": 5}, "`subject` is no text but int"),
        ({"target_true": 5}, "`target_true` is no text but int"),
        ({"case": 5}, "`case` is no text but int"),
        ({"rephrase_prompts": [1]}, r"`rephrase_prompts\[0\]` is no text but int"),
        ({"rephrase_prompts": ["x", " "]}, r"`rephrase_prompts\[1\]` is empty. Remove it"),
        ({"rephrase_prompts": 5}, "`rephrase_prompts` must be a list"),
        ({"rephrase_prompts": "x"}, "`rephrase_prompts` must be a list"),
    ],
)
def test_what_is_no_text_is_named(fields, why):
    record = {"prompt": "The war ended in", "target_new": "1945", **fields}
    for make in (EditRequest.from_dict, lambda record: EditRequest(**record)):
        with pytest.raises(RequestError, match=why):
            make(record)
