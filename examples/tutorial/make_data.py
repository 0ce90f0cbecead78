"""Write the files of docs/tutorial.md: chats, problems and held-out problems."""

import json
import random


def write(name, rows):
    with open(name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


numbers = [f"{number:05d}" for number in random.Random(0).sample(range(100_000), 2250)]
pairs = [(f"sort {number}", "".join(sorted(number))) for number in numbers]
rows = [{"question": question, "answer": answer} for question, answer in pairs]
chats = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in pairs
]
write("chats.jsonl", [{"messages": chat} for chat in chats[:2000]])
write("problems.jsonl", rows[:2000])
write("held_out.jsonl", rows[2000:])
