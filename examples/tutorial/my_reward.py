from operator import eq


def digits_in_place(completion, answer):
    """Return the share of digits that are right, and 1 for all of them."""
    given = completion.strip()
    return sum(map(eq, given, answer)) / max(len(given), len(answer))
