"""Write a mini benchmark from seeded templates: all 15 datasets, small, with their real labels and field markers.

    python data/mini_benchmark.py [--out data/mini_benchmark] [--seed 42]

Every maker below turns a label into one sentence field of its dataset, in the form of the real examples. The words
come from `mini_lexicon.json`. Some examples have a misleading word, and the pair tasks cannot be solved from single
words, so the tasks are neither trivial nor hopeless for word counts (bands: `tests/test_mini_benchmark.py`).
"""

import argparse
import json
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from errors import InputError, entry_point  # noqa: E402
from files import atomic_folder, read_json, write_json  # noqa: E402

LEXICON = json.loads(Path(__file__).with_name("mini_lexicon.json").read_text(encoding="utf-8"))
EVAL_ROWS = 100  # examples in dev.json and in test.json
LEVELS = ["very negative", "negative", "neutral", "positive", "very positive"]
logger = logging.getLogger("gorp")

Maker = Callable[[str, random.Random], str]


def name(pattern: str, rng: random.Random) -> str:
    """A proper name: the slots of `pattern` filled from the lexicon."""
    return pattern.format(
        person=rng.choice(LEXICON["people"]), surname=rng.choice(LEXICON["surnames"]),
        place=rng.choice(LEXICON["places"]), title=rng.choice(LEXICON["titles"]), number=rng.randint(2, 9) * 100,
    )


def article(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def another(options: list[str] | dict, taken: str, rng: random.Random) -> str:
    """An option other than `taken`."""
    return rng.choice([option for option in options if option != taken])


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


# Topics: dbpedia, agnews, yahoo ---------------------------------------------------------------------------------------

def dbpedia(label: str, rng: random.Random) -> str:
    entity = LEXICON["entities"][label]
    pattern = rng.choice(entity["names"])
    facts = rng.sample(entity["facts"], 2)
    title, place = name(pattern, rng), rng.choice(LEXICON["places"])
    link = f"from {place} who" if "{person}" in pattern else f"in {place} that"
    text = f"{title} is {article(rng.choice(entity['kinds']))} {link} {facts[0]}"
    if rng.random() < 0.5:
        text += f" and {facts[1]}"
    if rng.random() < 0.5:
        other = LEXICON["entities"][another(LEXICON["entities"], label, rng)]
        text += f". The name was also given to {article(rng.choice(other['kinds']))} that {rng.choice(other['facts'])}"
    return f"Title: {title}\nText: {text}.\n"


def agnews(label: str, rng: random.Random) -> str:
    topic = LEXICON["news"][label]
    other = LEXICON["news"][another(LEXICON["news"], label, rng)]
    nouns, events = rng.sample(topic["nouns"], 2), rng.sample(topic["events"], 2)
    title = f"{capital(nouns[0])} {events[0]}" if rng.random() < 0.8 else f"{rng.choice(LEXICON['days'])} news"
    text = f"{rng.choice(LEXICON['places'])} - The {nouns[1]} {events[1]} on {rng.choice(LEXICON['days'])}"
    if rng.random() < 0.5:
        text += f", while the {rng.choice(other['nouns'])} {rng.choice(other['events'])}"
    return f"Title: {title}\nText: {text}.\n"


def yahoo(label: str, rng: random.Random) -> str:
    topic = LEXICON["questions"][label]
    nouns, deeds = rng.sample(topic["nouns"], 2), rng.sample(topic["deeds"], 2)
    title = f"Title: {capital(nouns[0])}, what now?\n" if rng.random() < 0.5 else ""
    answer = f"i had to {deeds[1]} myself, so look at the {nouns[1]} first"
    if rng.random() < 0.5:
        other = LEXICON["questions"][another(LEXICON["questions"], label, rng)]
        answer = f"it is easier than to {rng.choice(other['deeds'])}, just look at the {nouns[1]} first"
    return f"{title}Question: how can i {deeds[0]}?\nAnswer: {answer}.\n"


# Sentiment: yelp, amazon, IMDB, SST-2 ---------------------------------------------------------------------------------

def opinion(level: int, rng: random.Random, slip: float = 0.2) -> str:
    """An opinion word of `level` (0 to 4), now and then of a neighbouring level."""
    if rng.random() < slip:
        level = min(max(level + rng.choice([-1, 1]), 0), 4)
    return rng.choice(LEXICON["opinions"][LEVELS[level]]["words"])


def review(level: int, things: str, rng: random.Random) -> str:
    """Two or three sentences about one of the lexicon's `aspects`."""
    aspects = rng.sample(LEXICON["aspects"][things], 3)
    text = f"the {aspects[0]} was {opinion(level, rng)} and the {aspects[1]} {opinion(level, rng)}"
    if rng.random() < 0.5:
        text += f". the {aspects[2]} seemed {opinion(level, rng)} to me"
    if rng.random() < 0.6:
        text += f". {rng.choice(LEXICON['opinions'][LEVELS[level]]['verdicts'])}"
    return text + "."


def yelp(label: str, rng: random.Random) -> str:
    visit = f"we went to {name('{surname}', rng)} {rng.choice(LEXICON['times'])}"
    return f"Text: {visit}. {review(LEVELS.index(label), 'restaurant', rng)}\n"


def amazon(label: str, rng: random.Random) -> str:
    level = LEVELS.index(label)
    title = f"{opinion(level, rng)} {rng.choice(LEXICON['aspects']['product'])}"
    return f"Title: {capital(title)}\nText: {review(level, 'product', rng)}\n"


def good_or_bad(label: str, rng: random.Random) -> int:
    """A level from 0 to 4 on the label's side."""
    return rng.choice([3, 4] if label == "Good" else [0, 1])


def imdb(label: str, rng: random.Random) -> str:
    level = good_or_bad(label, rng)
    concession = ""
    if rng.random() < 0.7:
        aspects = rng.sample(LEXICON["aspects"]["film"], 2)
        concession = f"others called the {aspects[0]} {opinion(4 - level, rng)}"
        if rng.random() < 0.5:
            concession += f" and the {aspects[1]} {opinion(4 - level, rng)}"
        concession += ".<br /><br />"
    return f"i saw {rng.choice(LEXICON['titles'])} {rng.choice(LEXICON['times'])}.<br /><br />" \
           f"{concession}{review(level, 'film', rng)}"


def sst2(label: str, rng: random.Random) -> str:
    level = good_or_bad(label, rng)
    aspects = rng.sample(LEXICON["aspects"]["film"], 2)
    text = f"{article(opinion(level, rng))} {aspects[0]}"
    if rng.random() < 0.8:
        text += f" and {article(opinion(level, rng))} {aspects[1]}"
    if rng.random() < 0.25:
        text += f" , despite {article(opinion(4 - level, rng))} trailer"
    return f"Text: {text} . "


# Pairs of sentences: MNLI, CB, RTE, QQP, WiC --------------------------------------------------------------------------

def inference(label: str, rng: random.Random) -> str:
    """MNLI and RTE: what one of two people did, restated, denied, moved elsewhere, or with untold details added."""
    people = rng.sample(LEXICON["people"], 2)
    deeds = [scene[0] for scene in rng.sample(LEXICON["scenes"], 3)]
    where = rng.choice(LEXICON["places_of_deed"])
    premise = f"{people[0]} {deeds[0]} {where} {rng.choice(LEXICON['times'])}, and {people[1]} {deeds[1]}."
    hypothesis = {
        "entailment": [f"{people[0]} {deeds[0]} {where}.", f"{people[1]} {deeds[1]}.",
                       f"it was {people[0]} who {deeds[0]}."],
        "contradiction": [f"it is not true that {people[0]} {deeds[0]}.", f"nobody {deeds[1]}.",
                          f"{people[0]} {deeds[0]} {another(LEXICON['places_of_deed'], where, rng)}."],
        "neutral": [f"{people[0]} also {deeds[2]}.", f"{people[1]} {deeds[1]} with a friend.",
                    f"{people[1]} {deeds[2]}."],
    }[label]
    return f"sentence 1: {premise}\nsentence 2: {rng.choice(hypothesis)}"


def cb(label: str, rng: random.Random) -> str:
    speaker, other = rng.sample(LEXICON["people"], 2)
    deed, rumour = (scene[0] for scene in rng.sample(LEXICON["scenes"], 2))
    attitude = rng.choice(LEXICON["attitudes"][label]) if rng.random() < 0.85 else "told us that"
    talk = f"we talked {rng.choice(LEXICON['times'])} to {speaker}, who {rumour}."
    return f"sentence 1: {talk} {speaker} {attitude} {other} {deed}.\nsentence 2: {other} {deed}"


def qqp(label: str, rng: random.Random) -> str:
    deeds = rng.sample(rng.choice(list(LEXICON["topics"].values())), 2)
    intent = rng.choice(list(LEXICON["frames"]))
    first, second = rng.sample(LEXICON["frames"][intent], 2)
    questions = [first.format(deed=deeds[0]), second.format(deed=deeds[0])]
    if label == "False":
        questions[1] = rng.choice([
            second.format(deed=deeds[1]),
            rng.choice(LEXICON["frames"][another(LEXICON["frames"], intent, rng)]).format(deed=deeds[0]),
            second.format(deed=f"{deeds[0]} {rng.choice(LEXICON['limits'])}"),
        ])
    rng.shuffle(questions)
    return f"first sentence: {questions[0]}\nsecond sentence: {questions[1]}"


def wic(label: str, rng: random.Random) -> str:
    word, senses = rng.choice(list(LEXICON["senses"].items()))
    if label == "True":  # the first sense is the common one
        pair = rng.sample(senses[0 if rng.random() < 0.85 else 1], 2)
    else:
        pair = [rng.choice(senses[0]), rng.choice(senses[1])]
    rng.shuffle(pair)
    pair = [capital(f"{use} {rng.choice(LEXICON['times'])}." if rng.random() < 0.5 else f"{use}.") for use in pair]
    return f"word: {word}\n{pair[0]}\n{pair[1]}"


# Reading and reasoning: BoolQA, MultiRC, COPA -------------------------------------------------------------------------

def boolqa(label: str, rng: random.Random) -> str:
    sight = f"{rng.choice(LEXICON['sights']['kinds'])} of {rng.choice(LEXICON['places'])}"
    asked, *others = rng.sample(LEXICON["sights"]["facts"], rng.choice([2, 3]))
    sentences = [f"it is {'' if label == 'True' else 'not '}{asked}"]
    sentences += [f"it is {rng.choice(['', 'not '])}{fact}" for fact in others]
    rng.shuffle(sentences)
    passage = ". ".join(capital(sentence) for sentence in sentences)
    return f"question: is the {sight} {asked}\npassage: {capital(sight)} -- The {sight} is well known. {passage}."


def multirc(label: str, rng: random.Random) -> str:
    people, things = rng.sample(LEXICON["people"], 2), rng.sample(LEXICON["purchases"], 3)
    days = rng.sample(LEXICON["days"], 2)
    stories = [f"On {day} {person} bought {thing} {rng.choice(LEXICON['places_of_deed'])}"
               for day, person, thing in zip(days, people, things)]
    answer = things[0] if label == "True" else rng.choice([things[1], things[2], things[2]])
    rng.shuffle(stories)
    return f"paragraph: {'. '.join(stories)}.\nquestion: What did {people[0]} buy?\ncandidate answer: {answer}"


def copa(label: str, rng: random.Random) -> str:
    scene, other = rng.sample(LEXICON["scenes"], 2)
    person = rng.choice(LEXICON["people"])
    asked, role = rng.choice([("effect", 1), ("cause", 2)])
    right, wrong = f"{person} {scene[role]}.", f"{person} {other[role]}."
    first, second = (right, wrong) if label == "A" else (wrong, right)
    question = f'Which sentence is the {asked} of "{person} {scene[0]}."? Choose one between A and B.'
    return f"{question}\nA: {first}\nB: {second}"


# (task, dataset) -> maker of its sentences, and number of examples in its train.json
DATASETS: dict[tuple[str, str], tuple[Maker, int]] = {
    ("SC", "yelp"): (yelp, 400), ("SC", "amazon"): (amazon, 400), ("SC", "IMDB"): (imdb, 300),
    ("SC", "SST-2"): (sst2, 300),
    ("TC", "dbpedia"): (dbpedia, 1120), ("TC", "agnews"): (agnews, 400), ("TC", "yahoo"): (yahoo, 1700),
    ("NLI", "MNLI"): (inference, 400), ("NLI", "CB"): (cb, 126), ("NLI", "RTE"): (inference, 300),
    ("QQP", "QQP"): (qqp, 400), ("BoolQA", "BoolQA"): (boolqa, 400), ("MultiRC", "MultiRC"): (multirc, 400),
    ("COPA", "COPA"): (copa, 200), ("WiC", "WiC"): (wic, 400),
}


def make_rows(make: Maker, labels: list[str], count: int, rng: random.Random, seen: set[str]) -> list[dict[str, str]]:
    """`count` examples in random order, their labels as even as the count allows, none of their sentences in `seen`."""
    rows = []
    for index in range(count):
        label = labels[index % len(labels)]
        sentence = make(label, rng)
        while sentence in seen:
            sentence = make(label, rng)
        seen.add(sentence)
        rows.append({"sentence": sentence, "label": label})
    rng.shuffle(rows)
    return rows


def write_benchmark(out: Path, seed: int) -> None:
    """Write the benchmark to the folder `out`, which appears complete or not at all.

    Raises:
        InputError: `out` is already there, cannot be written, or a labels.json of CL_Benchmark/ is missing.
    """
    if out.exists():
        raise InputError(f"{out}: already there; remove it to create it again")
    try:
        with atomic_folder(out) as partial:  # two orders may create it at once, with the same examples
            for (task, dataset), (make, train_rows) in DATASETS.items():
                labels = read_json(ROOT / "CL_Benchmark" / task / dataset / "labels.json")
                folder = partial / task / dataset
                rng, seen = random.Random(f"{seed} {dataset}"), set()
                for split, count in (("train", train_rows), ("dev", EVAL_ROWS), ("test", EVAL_ROWS)):
                    write_json(folder / f"{split}.json", make_rows(make, labels, count, rng, seen))
                write_json(folder / "labels.json", labels)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None


@entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "mini_benchmark", help="folder to create")
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_benchmark(arguments.out, arguments.seed)
    logger.info("wrote %s: %d datasets", arguments.out, len(DATASETS))


if __name__ == "__main__":
    sys.exit(main())
