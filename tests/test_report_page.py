"""The report tells the truth at a glance: n, errors, changes, verdicts, chats, contrast, layout."""

import colorsys
import json
import math
import re
import shutil
import statistics
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest
import torch
from browsing import FLAGS
from conftest import VOCAB, save_tiny, tiny_config
from report_example import BITS, example_report, write_run

from data.chat.rendering import Chat
from data.chat.tokenizer import save_chat_tokenizer
from data.chat.tools import TOOLS
from evals.engines import load_model
from evals.report import charts, markup, page, stages
from evals.report.build import COLUMNS, texts
from evals.report.metric_names import metric_of
from evals.report.samples import TOO_LONG, as_text, conversation, samples
from evals.report.verdicts import decisions
from models.hf import save_hf
from models.nanollama import NanoLlama

COUNTED = re.compile(r"\bn [\d,]+|[\d,]+ tokens|n not recorded|not measured")
HEADINGS = {name: (heading, chance) for name, (heading, _, _, chance) in COLUMNS.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("run")
    write_run(place)
    return place


@pytest.fixture(scope="module")
def report(run):
    return example_report(run, "the <model>")


@pytest.fixture(scope="module")
def html(report) -> str:
    return texts(report)["report.html"]


def render(report) -> str:
    return page.page(report, HEADINGS)


def text_of(html: str) -> str:
    body = re.sub(r"<style>.*?</style>", "", html, flags=re.S)
    return " ".join(unescape(re.sub("<[^>]+>", " ", body)).split())


def spans(html: str, kind: str) -> list[tuple[str, str]]:
    """(class, content) of the spans of a kind; they nest no other spans."""
    return re.findall(rf'<span class="({kind}[^"]*)">(.*?)</span>', html)


def section(html: str, title: str) -> str:
    return re.search(rf"<section[^>]*><h2>{title}</h2>.*?</section>", html, re.S)[0]


def test_every_score_has_its_n_or_says_why_not(html):
    scores = [text_of(content) for _, content in spans(html, "score")]
    assert len(scores) > 25
    for score in scores:
        assert COUNTED.search(score), score
    # Outside those spans, the sections of scores have no number but limits, chances and changes.
    for title in ("Gates", "Stage by stage", "Benchmarks", "Held-out text", "Needle in a haystack"):
        rest = re.sub(r'<span class="score">.*?</span>', "", section(html, title))
        for _, cell in re.findall("<(td|div class=.val.)>(.*?)</(?:td|div)>", rest):
            cell = re.sub(r'<span class="change.*?</span>', "", cell)
            numbers = re.findall(r"\d+\.\d+", text_of(cell))
            assert not numbers or "go if" in cell or cell in ("25.0", "50.0"), cell
    tiles = re.findall(r'<div class="tile"><b>[\d.]+</b><span>(.*?)</span>', html)
    assert len([tile for tile in tiles if COUNTED.search(tile)]) == 2
    assert "do not state n" in section(html, "Beside published models")
    assert "does not record their n" in section(html, "After pretraining")


def test_plus_minus_has_one_meaning(report, html):
    assert text_of(html).count("± is one standard error") == 1
    assert "interval" not in text_of(html)
    for stage in report["stages"].values():
        for key, estimate in stage["metrics"].items():
            if estimate["stderr"]:
                metric = metric_of(key)
                value = f"{metric.text(estimate['value'])} ± {metric.text(estimate['stderr'])}"
                assert value in text_of(html), key
    [whisker] = re.findall(
        r'class="err" style="left:([\d.]+)%;width:([\d.]+)%',
        charts.bar("a", "50", 50.0, 100.0, stderr=4.0),
    )
    assert tuple(map(float, whisker)) == (46.0, 8.0)
    assert "± is\none standard error" in texts(report)["comparison_table.md"]


def test_a_go_stands_beside_the_loss_that_it_allows(report, html):
    head = text_of(html[: html.index('<div class="tiles">')])
    assert "Verdict after dpo : 2 of 3 gates within their go limits" in head
    assert "3.700 65,536 tokens , change against sft: +0.050 ▼ worse" in head
    assert "change since step 260: +1.000 ▼ worse" in head  # the sum of the steps
    assert "not a mark for quality" in head and "Caution: a gate is between" in head
    gates = text_of(section(html, "Gates"))
    bits = "3.650 65,536 tokens +0.950 ▼ worse step 260 go if change ≤ +1.200"
    assert f"Held-out text, bits per byte (lower is better) GO {bits}" in gates
    for meaning in ("GO every gate is within", "CAUTION a gate is between", "NO-GO a gate is beyo"):
        assert meaning in gates
    # The change of an absolute gate is shown, too.
    assert "GO 25.0 ± 7.8 n 32 +25.0 ± 7.8 ▲ better, paired step 260 go if ≥ 6.0" in gates


def test_no_verdict_without_its_gates(report, html):
    cards = re.findall(r'<div class="decision.*?</div><p>.*?</div>', html, re.S)
    assert len(cards) == 3
    for card in cards:
        assert re.findall("<tbody>(<tr>.*?</tr>)+</tbody>", card)
    event = {**report["training"]["gates"][1], "gates": [], "values": [], "references": []}
    without = {**report, "training": {**report["training"], "gates": [event]}}
    text = section(render(without), "Gates")
    assert 'class="chip go"' not in text[text.index('class="gates"') :]
    assert "NOT JUDGED" in text and "nothing was judged" in text


def test_verdicts_without_results_or_without_a_log(run, report):
    """Decisions of a log whose results are gone; decisions of results without a log."""
    bare = {**report, "stages": {}}
    assert [d["outcome"] for d in decisions(bare)] == ["go", "go", "caution"]
    text = text_of(section(render(bare), "Gates"))
    assert "GO 2.310 n not recorded go if ≤ 2.700" in text
    assert "NOT RECORDED 3.650 n not recorded +0.950 ▼ worse before" in text
    unlogged = {**report, "training": None}
    assert [d["step"] for d in decisions(unlogged)] == [260, "sft", "dpo"]
    assert "GO 2.310 65,536 tokens go if ≤ 2.700" in text_of(section(render(unlogged), "Gates"))
    # Results measured again after the decision do not replace its values.
    changed = json.loads(json.dumps(report))
    changed["training"]["gates"][0]["values"] = [2.5]
    assert "2.500 n not recorded go if" in text_of(section(render(changed), "Gates"))


def test_changes_are_paired_where_the_items_are_the_same(run, report, tmp_path):
    change = report["stages"]["dpo"]["metrics"]["pairs.preferred"]["change"]
    scores = [
        [
            json.loads(line)["scores"]["preferred"]
            for line in (run / f"results/{name}/pairs.samples.jsonl").read_text().splitlines()
        ]
        for name in ("sft", "dpo")
    ]
    differences = [after - before for before, after in zip(*scores, strict=True)]
    assert change["value"] == pytest.approx(statistics.mean(differences))
    assert change["stderr"] == pytest.approx(statistics.stdev(differences) / math.sqrt(200))
    assert (change["n"], change["paired"], change["against"]) == (200, True, "sft")
    bits = report["stages"]["sft"]["metrics"]["all.bits_per_byte"]["change"]
    assert bits["value"] == pytest.approx(BITS["sft"][1] - BITS["step_260"][1])
    assert bits["stderr"] is None and not bits["paired"]
    write_run(tmp_path)
    path = tmp_path / "results" / "dpo" / "pairs.samples.jsonl"
    original = path.read_text()
    for edit in (
        original.replace('"id": "3"', '"id": "x"'),  # another item
        original.replace('"preferred": 1.0', '"preferred": 0.0', 5),  # not the reported mean
        "",
    ):
        path.write_text(edit)
        change = stages.stages(tmp_path / "results")["dpo"]["metrics"]["pairs.preferred"]["change"]
        independent = math.hypot(*(math.sqrt(p * (1 - p) / 199) for p in (0.565, 0.53)))
        assert not change["paired"] and change["stderr"] == pytest.approx(independent)


def test_equal_items_do_not_make_a_change_certain(tmp_path):
    for name, right in (("step_1", 0.0), ("sft", 1.0)):
        folder = tmp_path / name
        folder.mkdir()
        estimate = {"value": right, "stderr": 0.0, "n": 2}
        lines = [{"id": i, "subject": "", "scores": {"acc": right}} for i in range(2)]
        (folder / "chat.samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / "chat.json").write_text(json.dumps({"samples": "chat.samples.jsonl"}))
        (folder / "decision.json").write_text(json.dumps({"metrics": {"chat": {"acc": estimate}}}))
    change = stages.stages(tmp_path)["sft"]["metrics"]["chat.acc"]["change"]
    assert change == {"against": "step_1", "value": 1.0, "stderr": 0.25, "n": 2, "paired": True}


def test_stages_are_in_the_order_of_training(tmp_path):
    names = ["step_1000", "step_90", "step_90_average", "sft"]
    for name in reversed(names[:3]):
        (tmp_path / name).mkdir()
        more = {"averages": 2} if "average" in name else {}
        content = {"metrics": {"x": {"acc": {"value": 0.5, "stderr": 0.1, "n": 25}}}, **more}
        (tmp_path / name / "decision.json").write_text(json.dumps(content))
    found = stages.stages(tmp_path)
    assert list(found) == ["step_90", "step_90_average", "step_1000"]
    against = [stage["metrics"]["x.acc"]["change"] for stage in found.values()]
    assert [change and change["against"] for change in against] == [None, "step_90", "step_90"]
    (tmp_path / "step_90" / "decision.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        stages.stages(tmp_path)


def test_only_changes_beyond_noise_are_bold_or_judged(html):
    changes = spans(html, "change")
    kinds = {kind for kind, _ in changes}
    assert kinds == {"change better", "change worse", "change noise", "change equal"}
    for kind, content in changes:
        assert ("<b>" in content) == (kind in ("change better", "change worse") and "±" in content)
        assert ("within noise" in content) == (kind == "change noise")
    metric = metric_of("hellaswag.acc")
    for value, kind in ((0.195, "noise"), (0.197, "better"), (-0.197, "worse"), (0.0, "equal")):
        change = {"value": value, "stderr": 0.1, "n": 9, "paired": True}
        assert markup.direction(metric, change)[0] == kind
        lower = markup.direction(metric._replace(lower=True), change)[0]
        assert lower == {"better": "worse", "worse": "better"}.get(kind, kind)
    assert "<b>" not in re.search('<tr class="own">.*?</tr>', html)[0]


def test_metrics_have_names_for_people(html, report):
    text = text_of(re.sub("<code>.*?</code>", "", html))
    assert not re.findall(r"\b\w+\.(?:acc|acc_norm|bits_per_byte|preferred)\b", text)
    for key in report["stages"]["dpo"]["metrics"]:
        assert f'title="{key}"' in html
    named = {
        "all.bits_per_byte": "Held-out text, bits per byte (lower is better)",
        "choice.commonsense_qa_cloze_acc": "CommonsenseQA, cloze, accuracy (%)",
        "tool_use.free_syntax": "Tool use (BFCL), free decoding, calls are valid JSON (%)",
        "needle.accuracy_16384": "Needle in a haystack, accuracy, at 16,384 tokens (%)",
        "new_task.new_metric": "new_task.new_metric",
    }
    assert {key: metric_of(key).title for key in named} == named
    chances = {"mmlu.acc": 25, "choice.piqa_acc_norm": 50, "pairs.preferred": 50, "chat.acc": None}
    assert {key: metric_of(key).chance for key in chances} == chances
    stated = metric_of("chat.choice", {"chat.choice_chance": {"value": 0.25}})
    assert stated.chance == 25
    assert all(
        metric_of(f"{task}.{name}").chance == chance
        for _, task, name, chance in COLUMNS.values()
        if task
    )


def test_curves_of_every_stage(html):
    curves = section(html, "Training curves")
    titles = [text_of(title) for title in re.findall("<h3>(.*?)<small>", curves)]
    assert titles == ["pretraining: base, long_context, gold", "sft", "dpo"]
    labels = re.findall(r'<svg[^>]*aria-label="([^"]*)"[^>]*><title>([^<]*)</title>', curves)
    assert len(labels) == curves.count("<svg") == 6 and all(a == b for a, b in labels)
    assert [label[0].split(",")[0] for label in labels[::2]] == ["training loss"] * 3
    assert all("learning rate by step" in label[0] for label in labels[1::2])


def test_conversations_are_turns_with_roles_and_nothing_is_markup(html):
    chat = section(html, "Samples")
    kinds = re.findall(r'<div class="part (\w+)">', chat)
    assert kinds == ["user", "thought", "call", "result", "assistant"]
    assert '<details><summary><span class="role">thought</span></summary>' in chat
    assert "I should &lt;b&gt;multiply&lt;/b&gt;." in chat and "<i>else" not in chat
    assert "<pre><code>calculator(expression=&#x27;17 * 23&#x27;)</code></pre>" in chat
    assert "&lt;u&gt;Paris" in chat and "the &lt;model&gt;" in html and "<model>" not in html


def test_a_conversation_is_played_with_its_tools(text_store, tmp_path):
    chat: Chat = save_chat_tokenizer(tmp_path, text_store / "tokenizer")
    calculator = next(tool for tool in TOOLS if tool["function"]["name"] == "calculator")
    call = {"function": {"name": "calculator", "arguments": {"expression": "17 * 23"}}}
    replies = [
        {"role": "assistant", "content": "", "thought": "Multiply.", "tool_calls": [call]},
        {"role": "assistant", "content": "It is 391."},
    ]

    def generate(prompt):
        before = [{"role": "user", "content": "x"}]
        row = chat.clean({"messages": [*before, replies.pop(0)]})
        ids = chat.encode([row])[0].ids.tolist()
        return iter(ids[len(chat.prompt(before)) :])

    sample = conversation(chat, generate, "What is 17 * 23?", [calculator])
    assert [(part["kind"], part["text"]) for part in sample["turn"]] == [
        ("thought", "Multiply."),
        ("call", "calculator(expression='17 * 23')"),
        ("result", "391"),
        ("content", "It is 391."),
    ]
    text = as_text({"prompt": "What is 17 * 23?", "temperature": 0.0, **sample})
    assert "thought: [Multiply.]\n" in text and "result: 391\nassistant: [It is 391.]" in text

    def too_long(prompt):
        raise ValueError("too long")

    failed = conversation(chat, too_long, "x", [])
    assert failed == {"text": None, "turn": [{"kind": "note", "text": "too long"}]}


@pytest.mark.parametrize("is_chat", [True, False])
def test_samples_are_conversations_for_a_chat_model_only(is_chat, text_store, tmp_path):
    folder = tmp_path / "step_1"
    ids = {}
    if is_chat:
        ids = save_chat_tokenizer(folder, text_store / "tokenizer").config_ids
        config = tiny_config(vocab_size=VOCAB + 8, max_position_embeddings=64)
        save_hf(folder, config, NanoLlama(config, seed=1).state_dict(), torch.float32, **ids)
    else:
        save_tiny(folder, tiny_config(max_position_embeddings=64), text_store)
    found = samples(load_model(folder), folder, ["Hi", "x " * 99], 4)
    assert [sample["temperature"] for sample in found] == [0.0, 0.8] * 2
    assert all(("turn" in sample) == is_chat for sample in found)
    assert found[2]["text"] is None  # longer than the context
    if is_chat:
        assert found[0]["turn"] and found[2]["turn"] == [{"kind": "note", "text": TOO_LONG}]


def test_tables_have_captions_scopes_and_scroll_alone(html):
    assert html.startswith('<!DOCTYPE html>\n<html lang="en">')
    tables = re.findall("<table.*?</table>", html, re.S)
    assert len(tables) >= 7
    for table in tables:
        assert "<caption>" in table and not re.findall("<th>", table)
        assert table.count('scope="row"') == table.count("<tr") - 1
        first = html.index(table)
        assert re.search(r'<div class="scroll" role="region" tabindex="0"[^>]*>$', html[:first])
    assert html.count("<svg") == html.count('role="img"')
    assert "@media print" in html and "break-inside: avoid" in html


def themes(css: str) -> dict[str, dict[str, str]]:
    """Custom properties of the light, dark and print themes."""
    roots = re.findall(r":root \{(.*?)\}", css, re.S)
    found = [dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6});", root)) for root in roots]
    return dict(zip(("light", "dark", "print"), found, strict=True))


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two #rrggbb colours (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


CSS = Path(page.__file__).with_name("report.css").read_text(encoding="utf-8")
BACKGROUNDS = ("--bg", "--card", "--faint", "--own")
CHIPS = ("--go", "--caution", "--no-go", "--plain")
MARKS = ("--accent", "--accent-soft", "--warm", "--ref", "--ink", "--soft", *CHIPS)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_contrast_is_wcag_aa_in_both_modes(theme):
    colours = themes(CSS)[theme]
    used = set(re.findall(r"(?<![-\w])color: var\((--[\w-]+)\)", CSS))
    assert used >= {"--ink", "--soft", "--accent", "--go", "--no-go", "--chip"}
    pairs = [(text, back) for text in used - {"--chip"} for back in BACKGROUNDS]
    pairs += [("--chip", chip) for chip in CHIPS]
    for text, back in pairs:
        ratio = contrast(colours[text], colours[back])
        assert ratio >= 4.5, f"{text} on {back}: {ratio:.2f}"
    for mark in MARKS:
        for back in ("--card", "--faint"):
            ratio = contrast(colours[mark], colours[back])
            assert ratio >= 3.0, f"{mark} on {back}: {ratio:.2f}"


def test_the_css_has_no_other_colours():
    rules = re.sub(r":root \{.*?\}", "", CSS, flags=re.S)
    assert set(re.findall(r"#[0-9a-f]{3,8}\b", rules)) == {"#15171b"}  # text on the heat map
    backgrounds = set(re.findall(r"background: var\((--[\w-]+)\)", rules))
    assert backgrounds <= {*BACKGROUNDS, *MARKS}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        hue, light = re.fullmatch(r"hsl\((\d+) 62% (\d+)%\)", charts.heat_colour(share)).groups()
        rgb = colorsys.hls_to_rgb(int(hue) / 360, int(light) / 100, 0.62)
        colour = "#" + "".join(f"{round(255 * part):02x}" for part in rgb)
        assert contrast(colour, "#15171b") >= 4.5, share


MEASURE = """<script>
const wide = [...document.querySelectorAll("body *")]
  .filter(e => !e.parentElement.closest(".scroll, svg, .sample, .plot"))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 99));
const scrolling = [...document.querySelectorAll(".scroll")]
  .filter(e => e.scrollWidth > e.clientWidth).map(e => e.ariaLabel);
parent.document.body.dataset.measured = JSON.stringify(
  {width: innerWidth, scroll: document.documentElement.scrollWidth, wide, scrolling});
</script>"""


@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_never_scrolls_sideways(width, html, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    path = tmp_path / "host.html"  # a window cannot be as narrow as a phone; a frame can
    unprotected = html.replace("Content-Security-Policy", "x")  # the policy forbids scripts
    content = escape(unprotected.replace("</body>", f"{MEASURE}</body>"))
    frame = f'<iframe width="{width}" height="900" style="border:0" srcdoc="{content}"></iframe>'
    path.write_text(f'<meta charset="utf-8"/><body>{frame}</body>', encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    size = ["--window-size=1500,1000", "--hide-scrollbars", "--dump-dom"]
    command = [chromium, "--headless", *FLAGS, profile, *size, path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    measured = json.loads(unescape(re.search('data-measured="([^"]*)"', dom)[1]))
    assert measured["width"] == width
    assert measured["scroll"] <= width and measured["wide"] == []
    # At 1,400 px only the table of published models may need its own scroll bar.
    assert set(measured["scrolling"]) <= {"Scores of published models, percent"} or width < 1400
