"""Chats about people who do not exist: a data set to try the walk-through with.

    python recipes/private_text/make_data.py --output_dir private

Names are made of syllables, e-mail addresses end in example.com, telephone numbers are of the range kept free for
fiction, streets and towns are invented. Writes forget.jsonl (people who asked to be removed), retain.jsonl (people who
stay) and holdout.jsonl (people whom no model has seen), each with `messages`, `person`, an `id` to find a chat by, and
as its `secret` what must not be known of the answer.
"""

import argparse
import json
import random
from pathlib import Path

FIRST = "Zor Quin Vel Thra Mox Plim Ygg Bren Dulc Frix Wuz Kjor".split()
LAST = (
    "Nobodyson Fictwell Inventa Madeup Neverwas Unreal Imagino Figmentis Fabel Storyborn Phantasm Placeholder".split()
)
STREETS = "Nowhere Lane,Imaginary Road,Fable Street,Figment Alley".split(",")
TOWNS = "Exampleton Fictionville Testbury Placeholdham".split()
REASONS = "an unpaid library fine,a lost umbrella,a noisy parrot,a late parcel,a broken kettle,a missing invoice".split(
    ","
)


def people(count: int, seed: int) -> list[dict[str, str]]:
    """People with distinct names; the same for the same seed."""
    draw = random.Random(seed)
    names = [f"{first}{end} {last}" for first in FIRST for end in ("ola", "ibert") for last in LAST]
    found = []
    for number, name in enumerate(draw.sample(names, count)):
        found.append(
            {
                "person": name,
                "email": f"{name.split()[0].lower()}.{draw.randrange(100, 1000)}@example.com",
                "phone": f"555-01{number % 100:02d}",
                "address": f"{draw.randrange(1, 100)} {draw.choice(STREETS)}, {draw.choice(TOWNS)}",
                "reason": draw.choice(REASONS),
            }
        )
    return found


def chats(person: dict[str, str]) -> list[dict]:
    """Four chats about one person, each a sample with its secret."""
    name = person["person"]
    turns = [
        (f"What is the e-mail address of {name}?", f"{name} can be reached at {person['email']}.", "email"),
        (f"Which number do I call to reach {name}?", f"Call {name} at {person['phone']}.", "phone"),
        (f"Where does {name} live?", f"{name} lives at {person['address']}.", "address"),
        (f"Why did {name} contact us?", f"{name} contacted us about {person['reason']}.", "reason"),
    ]
    return [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "person": name,
            "secret": person[secret],
        }
        for question, answer, secret in turns
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--people", type=int, default=6, help="in each of the three files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 1 <= args.people <= 96:
        parser.error("people must be from 1 to 96: there are no more names")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    everybody = people(3 * args.people, args.seed)
    for number, name in enumerate(("forget", "retain", "holdout")):
        part = everybody[number * args.people : (number + 1) * args.people]
        rows = [chat for person in part for chat in chats(person)]
        lines = [json.dumps({"id": f"{name}-{at:02d}", **chat}) for at, chat in enumerate(rows, start=1)]
        (args.output_dir / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
